"""The GPU script where there is none: every check is listed as not run, with the reason; failures are not hidden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, gpu_checks
from export.exporter import export_bundle
from runtime.backends import cuda_backend
from runtime.errors import UsageError
from tests.checkpoints import make_checkpoint
from tests.parity.dense_models import MODELS, make_bundle
from tests.unit.fake_engine import fake_device


def no_gpu() -> Any:
    raise UsageError("no NVIDIA GPU can be used (none found): make setup-board")


def test_without_a_gpu_everything_is_listed_as_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(tmp_path / "b", MODELS["mha"]).path
    monkeypatch.setattr(gpu.run, "__defaults__", (no_gpu,))
    assert gpu.main([str(bundle), "--out", str(tmp_path / "out" / "gpu.json")]) == 0
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert result["not_run"] == list(gpu.CHECKS) == list(result["checks"])
    assert result["gpu"] is None and result["machine"]["kernel"]
    assert {c["reason"] for c in result["checks"].values()} == {
        "no NVIDIA GPU can be used (none found): make setup-board"
    }
    assert f"not run: {', '.join(gpu.CHECKS)}" in capsys.readouterr().out


def test_a_failure_is_told_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(settings: gpu.Settings, device: Any) -> gpu.Result:
        raise ValueError("no kernel image")

    def absent(settings: gpu.Settings, device: Any) -> gpu.Result:
        raise gpu.NotRunError("no engines")

    checks = {"a": lambda s, d: {"ok": False, "wrong": 3}, "b": broken, "c": absent, "d": lambda s, d: {"ok": True}}
    monkeypatch.setattr(gpu, "CHECKS", checks)
    monkeypatch.setattr(gpu.run, "__defaults__", (fake_device,))
    bundle, out = make_bundle(tmp_path / "b", MODELS["mha"]).path, tmp_path / "gpu.json"
    assert gpu.main([str(bundle), "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert [check["status"] for check in result["checks"].values()] == ["fail", "fail", "not run", "pass"]
    assert result["checks"]["a"]["wrong"] == 3
    assert result["checks"]["b"]["error"] == "ValueError: no kernel image"
    assert (result["not_run"], result["gpu"]["name"]) == (["c"], "Orin")
    assert "bench: error: failed: a, b" in capsys.readouterr().err


def test_the_checks_themselves_on_a_fake_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their code, not a GPU: torch on the CPU behind the fake driver. Nothing is late there, so the negative control of
    the stress test finds nothing, and the check says that it has shown nothing.
    """
    export_bundle(str(make_checkpoint(tmp_path / "checkpoint", "qwen2_moe")), tmp_path / "b")
    monkeypatch.setattr(cuda_backend, "open_device", fake_device)
    monkeypatch.setattr(gpu_checks, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(gpu_checks.torch.cuda, "_sleep", lambda cycles: None)

    def no_kernel(*arguments: Any) -> None:
        raise UsageError("no nvcc")

    monkeypatch.setattr(cuda_backend, "ExpertKernel", no_kernel)
    result = gpu.run(gpu.Settings(tmp_path / "b", slots_per_layer=4, tokens=4, context=64), fake_device)
    found = {name: check["status"] for name, check in result["checks"].items()}
    assert found == {
        "parity": "pass",
        "arena_reads": "pass",
        "slot_overwrites": "fail",
        "prefetch_parity": "pass",
        "tensorrt_parity": "not run",
        "graphs_parity": "not run",
        "read_rates": "pass",
        "expert_kernel": "not run",
        "decode_cuda": "pass",
        "decode_tensorrt": "not run",
        "decode_graphs": "not run",
    }, result["checks"]
    checks = result["checks"]
    assert checks["parity"]["fp32"] < 1e-6 < checks["parity"]["fp16"]
    assert checks["arena_reads"]["blobs"] == 3 * 7 and checks["arena_reads"]["wrong"] == 0
    assert (checks["slot_overwrites"]["kernels"], checks["slot_overwrites"]["wrong"]) == (100, 0)
    assert checks["slot_overwrites"]["wrong_without_events"] == 0
    assert checks["decode_cuda"]["over_floor"] > 1
    assert checks["prefetch_parity"]["misses"] >= checks["prefetch_parity"]["prefetched"] > 0
