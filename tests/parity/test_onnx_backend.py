"""The ONNX Runtime back-end's promises beyond its numbers: it refuses damaged files, tells what is missing, and holds
the memory it states."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.bundle import Bundle
from runtime.errors import BundleError, EdgeError, UsageError
from runtime.layout import MANIFEST, graph_file, layer_file
from tests.parity.dense_models import MODELS, make_bundle, write_manifest

onnxruntime = pytest.importorskip("onnxruntime")
CONFIG = MODELS["gqa-bias-gate"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle", CONFIG).path


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The graphs that were given to ONNX Runtime to parse."""
    parsed: list[bytes] = []
    real = onnxruntime.InferenceSession

    def record(graph: bytes, *args: Any, **kwargs: Any) -> Any:
        parsed.append(graph)
        return real(graph, *args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    return parsed


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def open_backend(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> OnnxRuntimeBackend:
    bundle = Bundle.open(path)
    try:
        return OnnxRuntimeBackend(bundle, dtype, threads=1, **options)
    finally:
        bundle.close()


def test_graph_is_checked_before_it_is_parsed(path: Path, sessions: list[bytes]) -> None:
    """A graph whose xxh3 in the manifest was forged along with it still fails on its BLAKE3, unparsed."""
    file = graph_file("head", "fp32")
    before = json.loads((path / MANIFEST).read_text())
    flip(path / file, 100)
    write_manifest(path, CONFIG)
    forged = json.loads((path / MANIFEST).read_text())
    forged["files"][file]["blake3"] = before["files"][file]["blake3"]
    (path / MANIFEST).write_text(json.dumps(forged))
    with pytest.raises(BundleError, match=r"head\.fp32\.onnx: BLAKE3"):
        open_backend(path)
    assert sessions == []


def test_weights_are_checked_before_a_session_reads_them(path: Path, sessions: list[bytes]) -> None:
    """One flipped bit in a layer's weights: the error names the file, and no session of that layer was made."""
    flip(path / layer_file(1), 5000)
    with pytest.raises(BundleError, match=r"dense/layer_01\.safetensors: checksum"):
        open_backend(path)
    assert (path / graph_file("layer_00", "fp32")).read_bytes() in sessions
    assert (path / graph_file("layer_01", "fp32")).read_bytes() not in sessions


def test_graph_that_is_no_onnx(path: Path) -> None:
    """Consistent digests, but not a graph: ONNX Runtime's reason, with the file's name."""
    (path / graph_file("expert", "fp32")).write_bytes(b"\xff" * 64)
    write_manifest(path, CONFIG)
    with pytest.raises(BundleError, match=r"expert\.fp32\.onnx: ONNX Runtime refuses the graph"):
        open_backend(path)


def test_failing_run_names_the_shapes(path: Path) -> None:
    with pytest.raises(EdgeError, match=r"ONNX Runtime failed on x \[2, 63\]"):
        open_backend(path).run_head(torch.zeros(2, 63))


def test_bundle_is_not_needed_after_loading(path: Path) -> None:
    """The sessions have their own copy of the weights: an opened back-end works when the files are gone."""
    backend = open_backend(path)
    x = torch.ones(3, CONFIG.hidden_size)
    before = backend.run_head(x)
    for file in (path / "dense").iterdir():
        file.unlink()
    assert torch.equal(backend.run_head(x), before)


def test_bf16_is_refused(path: Path) -> None:
    with pytest.raises(UsageError, match="fp16 or fp32, not in bfloat16"):
        open_backend(path, torch.bfloat16)


def test_bundle_without_graphs(path: Path) -> None:
    write_manifest(path, CONFIG, graphs=("fp16",))
    with pytest.raises(UsageError, match=r"no fp32 ONNX graphs \(found: fp16\): export it again"):
        open_backend(path)


def test_missing_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"pip install 'remoe-edge\[onnxruntime\]'"):
        open_backend(path)


def test_cuda_is_never_replaced_in_silence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the provider, and with one that is offered but whose session then runs on the CPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match=r"offers CPUExecutionProvider: .*remoe-edge\[onnxruntime-gpu\]"):
        open_backend(path, provider="cuda")
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    real = onnxruntime.InferenceSession

    def fallen_back(graph: bytes, options: Any, providers: list[str]) -> Any:
        assert providers == both
        return real(graph, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", fallen_back)
    with pytest.raises(UsageError, match=r"fell back to \['CPUExecutionProvider'\] from CUDA"):
        open_backend(path, provider="cuda")


_MEASURE = """
import sys, torch
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.bundle import Bundle
from runtime.kv_cache import KVCache

def resident():
    return sum(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("Rss"))

bundle = Bundle.open(sys.argv[1])
import onnxruntime
dtype = getattr(torch, sys.argv[2])
torch.ones(8, 8) @ torch.ones(8, 8)
before = resident()
backend = OnnxRuntimeBackend(bundle, dtype, threads=1)
cache = KVCache(bundle.config, 128, dtype, torch.device("cpu"))
for _ in range(100):
    x, h = backend.run_block(0, torch.ones(1, bundle.config.hidden_size), cache)
    backend.run_mlp(0, h)
    backend.run_head(x)
    cache.advance(1)
print(resident() - before, OnnxRuntimeBackend.weight_bytes(bundle, dtype))
"""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_is_what_weight_bytes_says(tmp_path: Path, dtype: str) -> None:
    """57 M weights: 100 steps later the process holds the stated 4 bytes of each, and at most 32 MB for the rest.

    One more copy (prepacked, mapped, or not released) would be 113 MB or more. fp16 may take less: releases before 1.23
    have an fp16 product, a slow one, and keep the weights as they are.
    """
    config = replace(MODELS["mha"], hidden_size=512, vocab_size=50_000, dense_intermediate_size=20_000)
    made = make_bundle(tmp_path / "bundle", config)
    out = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(made.path), dtype], capture_output=True, text=True, check=True
    )
    held, stated = map(int, out.stdout.split())
    tensors = {(f, n): t.numel() for f, table in made.files.items() for n, t in table.items()}
    embedding = tensors.pop(("dense/embed.safetensors", "embed"))
    assert stated == 4 * sum(tensors.values()) + 2 * embedding
    assert stated > 4 * 56e6
    assert held - stated < 32e6
    assert dtype == "float16" or stated - held < 32e6
