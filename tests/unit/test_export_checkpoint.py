"""Checkpoints that are damaged, incomplete or unwanted: one clear error each, and no bundle."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoint import Checkpoint
from export.exporter import export_bundle
from export.settings import ExportOptions
from runtime.errors import CheckpointError, EdgeError
from tests.checkpoints import make_checkpoint, write_weights

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_experts": 3, "num_experts_per_tok": 2, "vocab_size": 40}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sharded") / "ck", "olmoe", fused=True, shards=3, **SMALL)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("single") / "ck", "olmoe", **SMALL)


def shard(path: Path, number: int) -> Path:
    return path / f"model-{number:05d}-of-00003.safetensors"


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    """Change a safetensors header in place, its length kept."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    path.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


def duplicate_tensor(path: Path) -> None:
    first, second = load_file(shard(path, 1)), load_file(shard(path, 2))
    name = min(first)
    save_file({**second, name: first[name]}, shard(path, 2))


def misplace(index: dict) -> None:
    first = shard(Path(), 1).name
    name = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = shard(Path(), 2).name


def flip_offsets(header: dict) -> None:
    entry = next(v for k, v in header.items() if k != "__metadata__" and v["data_offsets"][0] > 0)
    entry["data_offsets"] = [entry["data_offsets"][0] - 4, entry["data_offsets"][1] - 4]


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing shard": (lambda p: shard(p, 2).unlink(), ["1 of 3 shards missing", "model-00002-of-00003"]),
    "truncated shard": (lambda p: os.truncate(shard(p, 2), shard(p, 2).stat().st_size - 1), ["00002", "truncated"]),
    "empty shard": (lambda p: os.truncate(shard(p, 1), 0), ["00001", "truncated"]),
    "shard cut within its header": (lambda p: os.truncate(shard(p, 1), 40), ["00001", "truncated"]),
    "trailing bytes": (lambda p: shard(p, 3).open("ab").write(b"xyz"), ["00003", "3 bytes after the last tensor"]),
    "wrong shard in the index": (lambda p: edit_json(p / INDEX, misplace), [INDEX, "lies in model-00001"]),
    "tensor of the index is nowhere": (
        lambda p: edit_json(p / INDEX, lambda i: i["weight_map"].update(ghost=shard(p, 1).name)),
        ["ghost", "no shard holds it"],
    ),
    "tensor missing from the index": (
        lambda p: edit_json(p / INDEX, lambda i: i["weight_map"].pop("model.norm.weight")),
        ["model.norm.weight", "does not list"],
    ),
    "index points outside": (
        lambda p: edit_json(p / INDEX, lambda i: i["weight_map"].update(x="../evil.safetensors")),
        ["../evil.safetensors"],
    ),
    "index without map": (lambda p: edit_json(p / INDEX, lambda i: i.pop("weight_map")), ["no weight_map"]),
    "index is no JSON": (lambda p: (p / INDEX).write_text("{"), [INDEX, "not valid JSON"]),
    "tensor twice": (duplicate_tensor, ["00001", "again in model-00002"]),
    "duplicate key in a header": (
        lambda p: shard(p, 1).write_bytes((60).to_bytes(8, "little") + b'{"a":{},"a":{}}'.ljust(60)),
        ["00001", "'a' occurs twice"],
    ),
    "header is no JSON": (lambda p: shard(p, 1).write_bytes((9).to_bytes(8, "little") + b"{" * 9), ["00001", "JSON"]),
    "header of 2^62 bytes": (lambda p: shard(p, 1).write_bytes((1 << 62).to_bytes(8, "little") + b"{}"), ["00001"]),
    "overlapping tensors": (lambda p: edit_header(shard(p, 1), flip_offsets), ["00001", "overlap"]),
    "config missing": (lambda p: (p / "config.json").unlink(), ["config.json", "missing"]),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), ["config.json", "JSON object"]),
    "config with NaN": (lambda p: (p / "config.json").write_text('{"a": NaN}'), ["config.json", "NaN"]),
    "unknown architecture": (
        lambda p: edit_json(p / "config.json", lambda c: c.update(model_type="gpt2")),
        ["gpt2", "qwen2_moe", "olmoe"],
    ),
    "code of its own": (
        lambda p: edit_json(p / "config.json", lambda c: c.update(auto_map={"AutoModel": "evil.Model"})),
        ["auto_map", "never run"],
    ),
    "quantised": (
        lambda p: edit_json(p / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"})),
        ["quantization_config", "gptq"],
    ),
    "head of another shape": (
        lambda p: edit_json(p / "config.json", lambda c: c.update(vocab_size=41)),
        ["embed_tokens", "[40, 32]", "[41, 32]"],
    ),
    "layer missing": (
        lambda p: edit_json(p / "config.json", lambda c: c.update(num_hidden_layers=2)),
        ["model.layers.1.", "is missing"],
    ),
    "broken tokenizer": (lambda p: (p / "tokenizer.json").write_text("{"), ["tokenizer.json", "not valid JSON"]),
    "tokenizer of no kind": (
        lambda p: (p / "tokenizer.json").write_text('{"x": 1}'),
        ["tokenizer.json", "cannot read"],
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name: str, sharded: Path, tmp_path: Path) -> None:
    damage, words = DAMAGE[name]
    path = shutil.copytree(sharded, tmp_path / "ck")
    damage(path)
    with pytest.raises(CheckpointError) as error:
        export_bundle(path, tmp_path / "out", ExportOptions(graphs=()))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert os.listdir(tmp_path) == ["ck"]  # no bundle, nothing staged


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 70000.0])
@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.0.mlp.gate.weight"]
)
def test_values_that_do_not_fit_stop_the_export(name: str, value: float, single: Path, tmp_path: Path) -> None:
    path = shutil.copytree(single, tmp_path / "ck")
    tensors = load_file(path / "model.safetensors")
    tensors[name][1, 3] = value
    write_weights(path, tensors)
    out = tmp_path / "out"
    if value == 70000.0 and name.endswith("gate.weight"):
        export_bundle(path, out, ExportOptions(graphs=()))  # routers are fp32: it fits
        assert load_file(out / "routers/base.safetensors")["layer_00.weight"][1, 3] == 70000.0
        return
    with pytest.raises(CheckpointError, match=f"tensor {name}, values .* of it, has"):
        export_bundle(path, out, ExportOptions(graphs=()))
    assert os.listdir(tmp_path) == ["ck"]


def test_a_tensor_nobody_asked_for_is_refused(single: Path, tmp_path: Path) -> None:
    path = shutil.copytree(single, tmp_path / "ck")
    tensors = load_file(path / "model.safetensors")
    write_weights(path, {**tensors, "model.layers.0.mlp.extra.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"mlp.extra.weight has no place in the olmoe architecture"):
        export_bundle(path, tmp_path / "out", ExportOptions(graphs=()))
    write_weights(path, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    export_bundle(path, tmp_path / "out", ExportOptions(graphs=()))  # old transformers versions saved that one


def test_unsupported_dtypes_are_named(single: Path, tmp_path: Path) -> None:
    path = shutil.copytree(single, tmp_path / "ck")
    tensors = load_file(path / "model.safetensors")
    write_weights(path, {**tensors, "lm_head.weight": tensors["lm_head.weight"].double()})
    with pytest.raises(CheckpointError, match=r"lm_head.weight has dtype F64"):
        export_bundle(path, tmp_path / "out", ExportOptions(graphs=()))


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_never_opened(file: str, single: Path, tmp_path: Path) -> None:
    path = shutil.copytree(single, tmp_path / "ck", ignore=shutil.ignore_patterns("*.safetensors"))
    (path / file).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    with pytest.raises(CheckpointError, match=f"{file}.*can run code"):
        Checkpoint.open(path)
    assert not (tmp_path / "canary").exists()
    pickle.loads((path / file).read_bytes())
    assert (tmp_path / "canary").exists()  # the canary does sing when a pickle is opened


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere/at/all", "no such folder"), ("nowhere", "no such folder"), ("/x/y", "no such folder")]
)
def test_no_such_folder(name: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(name)


def test_a_hub_name_without_the_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'remoe-edge\[hub\]'"):
        Checkpoint.open("some-org/some-model")


def test_a_hub_name_is_downloaded(monkeypatch: pytest.MonkeyPatch, single: Path) -> None:
    class Hub:
        @staticmethod
        def snapshot_download(name: str, allow_patterns: list[str]) -> str:
            assert name == "some-org/some-model"
            assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
            return str(single)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    with Checkpoint.open("some-org/some-model") as checkpoint:
        assert checkpoint.path == single


def test_a_shard_that_shrinks_while_open_is_an_error(single: Path, tmp_path: Path) -> None:
    path = shutil.copytree(single, tmp_path / "ck")
    with Checkpoint.open(path) as checkpoint:
        info = max(checkpoint.tensors.values(), key=lambda t: t.offset)
        before = bytes(checkpoint.read(info, 0, info.bytes))
        assert before == bytes(memoryview((path / info.file).read_bytes())[info.offset :])
        os.truncate(path / info.file, info.offset + 1)
        with pytest.raises(EdgeError, match="became shorter"):
            checkpoint.read(info, 0, info.bytes)


def test_the_fingerprint_sees_config_headers_and_values(single: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        with Checkpoint.open(path) as checkpoint:
            return checkpoint.fingerprint()

    original = fingerprint(single)
    path = shutil.copytree(single, tmp_path / "ck")
    assert fingerprint(path) == original  # neither place nor time matter
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.gate.weight"][0, 0] += 1
    write_weights(path, tensors)
    assert fingerprint(path) != original
    path = shutil.copytree(single, tmp_path / "ck2")
    edit_json(path / "config.json", lambda c: c.update(rms_norm_eps=1e-4))
    assert fingerprint(path) != original
