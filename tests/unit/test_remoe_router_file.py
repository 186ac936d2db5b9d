"""Router files: the fingerprint of gates, what a tuned file says of itself, and which ones the engine refuses."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from export.exporter import export_bundle
from export.settings import ExportOptions
from runtime.bundle import Bundle
from runtime.errors import BundleError, EdgeError, UsageError
from runtime.layout import BASE_ROUTER, router_tensors
from runtime.router import Router
from runtime.router_file import Provenance, gates_sha256, load_router, save_router
from tests.checkpoints import make_checkpoint

TENSORS = {"layer_01.weight": torch.tensor([[1.0, -2.0], [0.5, 3.0]]), "layer_00.weight": torch.zeros(2, 2)}
SHAPES = {name: tuple(t.shape) for name, t in TENSORS.items()}
CPU = torch.device("cpu")


def provenance(base: str = "0" * 64) -> Provenance:
    return Provenance(base, "tiny", "remoe", {"lr": 1e-4}, {"sha256": "ab"}, {"eor": 0.5}, 3, {"torch": "2"})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("router")
    checkpoint = make_checkpoint(folder / "ck", "deepseek_v3", num_hidden_layers=2)  # has choice biases too
    export_bundle(checkpoint, folder / "bundle", ExportOptions(graphs=()))
    return folder / "bundle"


def test_the_fingerprint_is_the_one_of_the_definition() -> None:
    data = b"layer_00.weight\0" + bytes(16) + b"layer_01.weight\0" + struct.pack("<4f", 1.0, -2.0, 0.5, 3.0)
    assert gates_sha256(TENSORS) == hashlib.sha256(data).hexdigest()
    assert gates_sha256({n: t.numpy() for n, t in TENSORS.items()}) == gates_sha256(TENSORS)
    assert gates_sha256({n: t.bfloat16() for n, t in TENSORS.items()}) == gates_sha256(TENSORS)  # values, not storage
    assert gates_sha256({n: np.asarray(t.T) for n, t in TENSORS.items()}) != gates_sha256(TENSORS)


def test_a_saved_router_is_read_back_and_by_safetensors_too(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    save_router(path, TENSORS, provenance())
    tensors, told = load_router(path, SHAPES)
    assert told == provenance()
    assert all(torch.equal(tensors[n], TENSORS[n]) for n in TENSORS)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["remoe"])["metrics"] == {"eor": 0.5}
        assert torch.equal(file.get_tensor("layer_01.weight"), TENSORS["layer_01.weight"])
    first = path.read_bytes()
    assert (8 + int.from_bytes(first[:8], "little")) % 4096 == 0
    save_router(path, dict(reversed(TENSORS.items())), provenance())
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["r.safetensors"]


def test_a_file_without_provenance_is_taken_at_its_word(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "r.safetensors", {"format": "pt"})
    assert load_router(tmp_path / "r.safetensors", SHAPES)[1] is None


DAMAGE: dict[str, tuple[Callable[[dict], object], str]] = {
    "newer": (lambda v: v.update(format_version=2), "newer release"),
    "no hash": (lambda v: v.pop("base_gates_sha256"), "base_gates_sha256 is missing"),
    "steps as text": (lambda v: v.update(steps="3"), "steps is missing or no int"),
    "bool as version": (lambda v: v.update(format_version=True), "format_version is missing or no int"),
    "unknown": (lambda v: v.update(extra=1), "unknown field 'extra'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_provenance_names_the_field(name: str, tmp_path: Path) -> None:
    damage, words = DAMAGE[name]
    value = json.loads(provenance().to_json())
    damage(value)
    save_file(TENSORS, tmp_path / "r.safetensors", {"remoe": json.dumps(value)})
    with pytest.raises(BundleError, match=words):
        load_router(tmp_path / "r.safetensors", SHAPES)


def test_the_engine_takes_a_router_of_its_model_and_refuses_a_foreign_one(bundle: Path, tmp_path: Path) -> None:
    with closing(Bundle.open(bundle)) as opened:
        base = load_file(bundle / BASE_ROUTER)
        tuned = {n: t + 1.0 if n.endswith("weight") else t for n, t in base.items()}
        path = tmp_path / "tuned.safetensors"
        save_router(path, tuned, provenance(gates_sha256(base)))
        router = Router.load(opened, str(path), CPU)
        h = torch.linspace(-1, 1, opened.config.hidden_size)[None]
        layer = opened.config.moe_layers[0]
        tensors, _ = load_router(path, router_tensors(opened.config))
        assert router.route(layer, h)[0].equal(Router(opened.config, tensors, CPU).route(layer, h)[0])
        save_router(path, tuned, provenance(gates_sha256(tuned)))
        with pytest.raises(BundleError, match=r"tuned from 'tiny' .*, not from 'ck' .*edge tune"):
            Router.load(opened, str(path), CPU)
        save_router(path, TENSORS, provenance(gates_sha256(base)))
        with pytest.raises(BundleError, match="is not a router of ck"):
            Router.load(opened, str(path), CPU)
        with pytest.raises(UsageError, match="no router 'nowhere'"):
            Router.load(opened, "nowhere", CPU)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="cannot be written"):
        save_router(tmp_path / "gone" / "r.safetensors", TENSORS, None)
    assert os.listdir(tmp_path) == []
