"""A checkpoint with tuned gates: only the gates differ, and transformers routes with it as our engine does."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edge.cli import main
from export.exporter import export_bundle
from export.families import parse_config
from export.hf import export_hf
from export.settings import ExportOptions
from export.source import read_config
from remoe.gates import decision, find_gate
from runtime.bundle import Bundle
from runtime.config import ModelConfig
from runtime.engine import Engine, EngineOptions, GenerateOptions
from runtime.errors import BundleError, UsageError
from runtime.layout import BASE_ROUTER
from runtime.router import Router
from runtime.router_file import Provenance, gates_sha256, save_router
from tests.checkpoints import load_reference, make_checkpoint

CASES = {
    "qwen2_moe": {"dtype": "bf16", "shards": 3, "tokenizer": True, "vocab_size": 260},
    "granitemoe": {"dtype": "fp16"},
    "deepseek_v3": {"dtype": "bf16"},
    "olmoe": {"dtype": "fp32", "fused": True},
}


@pytest.fixture(scope="module", params=CASES)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint, its bundle, and a router whose gates moved by about a tenth."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(folder / "ck", request.param, **CASES[request.param])
    export_bundle(checkpoint, folder / "bundle", ExportOptions(graphs=()))
    base = load_file(folder / "bundle" / BASE_ROUTER)
    generator = torch.Generator().manual_seed(2)
    moved = {
        n: t + 0.1 * torch.randn(t.shape, generator=generator) if n.endswith("weight") else t for n, t in base.items()
    }
    router = folder / "tuned.safetensors"
    save_router(router, moved, Provenance(gates_sha256(base), "ck", "test"))
    config = parse_config(read_config(checkpoint))
    return {"folder": folder, "checkpoint": checkpoint, "router": router, "moved": moved, "config": config}


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def gate_names(config: ModelConfig, names: list[str]) -> list[str]:
    found = [n for n in names if n.endswith(("mlp.gate.weight", "router.layer.weight", "router.weight"))]
    assert len(found) == len(config.moe_layers)
    return found


@pytest.mark.parametrize("gate_dtype", ["fp32", "same"])
def test_nothing_but_the_gates_differs(tuned: dict[str, Any], gate_dtype: str, tmp_path: Path) -> None:
    source, out = tuned["checkpoint"], tmp_path / "out"
    done = export_hf(source, out, tuned["router"], gate_dtype)  # type: ignore[arg-type]
    before, after = all_tensors(source), all_tensors(out)
    gates = gate_names(tuned["config"], list(before))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name not in gates:
            assert tensor.dtype == after[name].dtype
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    for number, name in zip(tuned["config"].moe_layers, sorted(gates), strict=True):
        wanted = tuned["moved"][f"layer_{number:02d}.weight"]
        dtype = torch.float32 if gate_dtype == "fp32" else before[name].dtype
        assert after[name].dtype == dtype
        assert torch.equal(after[name], wanted.to(dtype))
    weights = {*source.glob("*.safetensors*")}
    for file in set(source.iterdir()) - weights:
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert json.loads((out / "remoe_router.json").read_text())["method"] == "test"
    assert done.gates == len(gates)
    assert (done.rounded > 0) == (CASES[tuned["config"].family]["dtype"] != "fp32")
    assert done.rounded < 0.02
    assert os.listdir(tmp_path) == ["out"]  # nothing staged is left
    index = out / "model.safetensors.index.json"
    if index.is_file():
        total = sum(t.numel() * t.element_size() for t in after.values())
        assert json.loads(index.read_text())["metadata"]["total_size"] == total


def test_transformers_routes_with_it_as_our_engine_does(tuned: dict[str, Any], tmp_path: Path) -> None:
    config = tuned["config"]
    export_hf(tuned["checkpoint"], tmp_path / "out", tuned["router"])
    model = load_reference(tmp_path / "out")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in config.moe_layers:
        gate = getattr(*find_gate(model, config, layer))
        gate.register_forward_hook(lambda m, i, o: seen.append((i[0].detach(), decision(o)[2])))
    prompt = [5, 6, 7, 8, 9, 10]
    with torch.no_grad():
        model(torch.tensor([prompt]))
    with closing(Bundle.open(tuned["folder"] / "bundle")) as bundle:
        router = Router.load(bundle, str(tuned["router"]), torch.device("cpu"))
    for layer, (h, experts) in zip(config.moe_layers, seen, strict=True):
        ours, _, _ = router.route(layer, h.reshape(-1, config.hidden_size))
        assert ours.sort(-1).values.equal(experts.sort(-1).values)
    with torch.no_grad():
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
    options = EngineOptions(slots_per_layer=4, context=64, dtype="fp32", router=str(tuned["router"]))
    with Engine.open(tuned["folder"] / "bundle", options) as engine:
        assert [t.id for t in engine.generate(prompt, GenerateOptions(6, ignore_eos=True))] == wanted


@pytest.mark.parametrize("tuned", ["qwen2_moe"], indirect=True)
def test_what_cannot_be_is_refused_and_leaves_nothing(tuned: dict[str, Any], tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_router(foreign, tuned["moved"], Provenance("0" * 64, "another", "test"))
    with pytest.raises(BundleError, match="tuned from 'another'"):
        export_hf(tuned["checkpoint"], tmp_path / "out", foreign)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export_hf(tuned["checkpoint"], tmp_path / "there", tuned["router"])
    assert sorted(os.listdir(tmp_path)) == ["foreign.safetensors", "there"]


@pytest.mark.parametrize("tuned", ["qwen2_moe"], indirect=True)
def test_pickles_are_not_copied_and_the_command_says_so(
    tuned: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(tuned["checkpoint"], tmp_path / "ck")
    (source / "pytorch_model.bin").write_bytes(b"stale weights")
    words = ["export", str(source), str(tmp_path / "out"), "--hf"]
    assert main([*words, "--router", str(tuned["router"]), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["left_out"] == ["pytorch_model.bin"]
    assert "left out, as their gates are not tuned: pytorch_model.bin" in said.err
    assert "loaded as bf16 choose otherwise in 0." in said.err
    assert not (tmp_path / "out/pytorch_model.bin").exists()
    assert main(words) == 2
    assert "--hf needs --router FILE" in capsys.readouterr().err
    assert main(["export", str(source), str(tmp_path / "b"), "--router", str(tuned["router"])]) == 2
    assert "--router goes with --hf" in capsys.readouterr().err
