"""The synthetic checkpoint is sane and exports, and the decode benchmark runs on its bundle."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from bench.decode import DecodeOptions, measure_setting, prefill_reads
from bench.export import largest_tensor_bytes
from bench.synthetic import write_synthetic
from export.exporter import export_bundle
from profiles.floor import Parts
from profiles.random_model import SyntheticOptions, Windows, decode_random, layer_shapes
from runtime.bundle import Bundle
from runtime.engine import Engine, EngineOptions
from runtime.errors import EdgeError, UsageError
from runtime.options import DTYPES

TINY = SyntheticOptions(
    layers=2, vocab_size=600, hidden_size=64, num_experts=6, top_k=2, expert_size=32, shared_size=48, num_heads=4
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "checkpoint"
    write_synthetic(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Path:
    out = checkpoint.parent / "tiny.bundle"
    export_bundle(checkpoint, out)
    return out


def test_windows_differ_and_wrap() -> None:
    windows = Windows(seed=0, values=1001)
    taken = [windows.take(700) for _ in range(5)]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(taken, 2))
    wrapped = windows.take(2500)
    assert len(wrapped) == 2500
    np.testing.assert_array_equal(wrapped[:1001], wrapped[1001:2002])


def test_weights_are_sane_and_no_two_experts_alike(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    tensors = {n: t for file in set(index["weight_map"].values()) for n, t in load_file(checkpoint / file).items()}
    assert tensors.keys() == index["weight_map"].keys()
    assert {n: tuple(tensors[n].shape) for n in layer_shapes(TINY, 1)} == layer_shapes(TINY, 1)
    assert (tensors["model.norm.weight"] == 1).all()
    assert tensors["model.embed_tokens.weight"].float().std().item() == pytest.approx(64 * 0.02, rel=0.05)
    experts = [t for n, t in tensors.items() if ".experts." in n and n.endswith("gate_proj.weight")]
    assert len(experts) == TINY.layers * TINY.num_experts
    assert len({t.float().sum().item() for t in experts}) == len(experts)
    spread = np.concatenate([t.float().numpy().ravel() for t in experts]).std()
    assert spread == pytest.approx(0.02, rel=0.05)


def test_index_counts_every_byte(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    expert = 3 * 32 * 64
    layer = 2 * 64 + 4 * 64 * 64 + 3 * 64 + 6 * 64 + 64 + 3 * 48 * 64 + 6 * expert
    assert index["metadata"]["total_size"] == 2 * (2 * layer + 2 * 600 * 64 + 64)
    assert largest_tensor_bytes(checkpoint) == 2 * 600 * 64


def test_parts_and_one_setting(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.decode._READ_BYTES", 1 << 20)
    opened = Bundle.open(bundle)
    parts = Parts.load(opened, "torch", DTYPES["fp16"])
    options = DecodeOptions(slots=(2,), tokens=8, rounds=1, backend="torch")
    try:
        setting = measure_setting(opened, parts, options, slots=2)
    finally:
        opened.close()
    assert min(dataclasses.astuple(setting.parts)) > 0
    assert setting.tpot_s > 0
    assert 0 < setting.floor_s < math.inf
    assert 0 <= setting.hit_rate < 1
    assert setting.alone_share is not None and setting.alone_share > 0


def test_all_resident_misses_nothing(bundle: Path) -> None:
    from bench.decode import _fill

    with Engine.open(bundle, EngineOptions(slots_per_layer=6, context=512, backend="torch")) as engine:
        _fill(engine)
        records = list(decode_random(engine, tokens=8, seed=0))
    assert len(records) == 4
    assert sum(sum(r.misses) for r in records) == 0
    assert all(r.hits == [2, 2] for r in records)


def test_prefill_reads_each_needed_expert_once(bundle: Path) -> None:
    found = prefill_reads(bundle, DecodeOptions(slots=(2,), backend="torch"))
    assert found["each_once"]
    assert found["experts_needed_by_layer"] == found["blobs_read_by_layer"] == [6, 6]
    assert found["read_bytes"] == 12 * Bundle.open(bundle).manifest.expert.file_bytes


def test_folder_in_the_way_and_full_disk(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="exists: remove it"):
        write_synthetic(checkpoint, TINY)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(EdgeError, match=r"0\.0 GB free, the checkpoint takes 0\.0 GB: use fewer --layers"):
        write_synthetic(tmp_path / "new", TINY)
    assert not (tmp_path / "new").exists()
