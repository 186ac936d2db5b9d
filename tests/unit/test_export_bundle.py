"""What an export writes: the checkpoint's values in the layout's places, the same bytes whichever way it got there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from blake3 import blake3
from safetensors.torch import load_file

from export.exporter import export_bundle
from export.settings import ExportOptions
from export.writer import ProgressEvent
from runtime import layout
from runtime.bundle import Bundle
from runtime.errors import CheckpointError, UsageError
from runtime.manifest import parse_manifest
from tests.checkpoints import load_reference, make_checkpoint, write_weights

FAMILIES = ("qwen2_moe", "olmoe", "qwen3_moe", "mixtral")  # latent attention: tests/parity/test_families_mla.py
NO_GRAPHS = ExportOptions(graphs=(), name="model")


def digests(bundle: Path) -> dict[str, str]:
    files = (p for p in sorted(bundle.rglob("*")) if p.is_file())
    return {str(p.relative_to(bundle)): blake3(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "ck"
    return make_checkpoint(path, "qwen2_moe", tokenizer=True, vocab_size=300, num_hidden_layers=2)


@pytest.fixture(scope="module")
def exported(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export_bundle(small, out, ExportOptions(name="model"))
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_values_lie_where_the_layout_says(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "ck", family)
    weights = load_reference(path).state_dict()  # stacked experts: [E, 2I, H], [E, H, I]
    out = tmp_path / "out"
    config = export_bundle(path, out, NO_GRAPHS).config
    embed, head = load_file(out / layout.EMBED_FILE), load_file(out / layout.HEAD_FILE)
    assert torch.equal(embed["embed"].float(), weights["model.embed_tokens.weight"])
    assert torch.equal(head["head"].float(), weights["lm_head.weight"])
    routers = load_file(out / layout.BASE_ROUTER)
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        dense = load_file(out / layout.layer_file(layer))
        assert {n: tuple(t.shape) for n, t in dense.items()} == layout.layer_tensors(config, layer)
        qkv = torch.cat([weights[f"{at}self_attn.{n}_proj.weight"] for n in "qkv"])
        assert torch.equal(dense["qkv"].float(), qkv)
        assert torch.equal(dense["o"].float(), weights[at + "self_attn.o_proj.weight"])
        assert torch.equal(routers[f"layer_{layer:02d}.weight"], weights[at + "mlp.gate.weight"])
        for expert in range(config.router.num_experts):
            both, down = (weights[f"{at}mlp.experts.{n}_proj"][expert] for n in ("gate_up", "down"))
            blob = (out / layout.expert_file(layer, expert)).read_bytes()
            values = torch.frombuffer(bytearray(blob), dtype=torch.float16).float()
            wanted = torch.cat([both.flatten(), down.flatten()])
            assert torch.equal(values[: len(wanted)], wanted)
            assert len(blob) % layout.PAGE_BYTES == 0
            assert not any(blob[2 * len(wanted) :])


def test_shared_experts_and_biases(small: Path, exported: Path) -> None:
    weights = load_reference(small).state_dict()
    dense, at = load_file(exported / layout.layer_file(1)), "model.layers.1."
    shared = [weights[f"{at}mlp.shared_expert.{n}_proj.weight"] for n in ("gate", "up", "down")]
    assert torch.equal(dense["mlp.gate_up"].float(), torch.cat(shared[:2]))
    assert torch.equal(dense["mlp.down"].float(), shared[2])
    assert torch.equal(dense["mlp.router"].float(), weights[at + "mlp.shared_expert_gate.weight"])
    bias = torch.cat([weights[f"{at}self_attn.{n}_proj.bias"] for n in "qkv"])
    assert torch.equal(dense["qkv_bias"].float(), bias)


def test_the_manifest_says_what_is_there(exported: Path) -> None:
    manifest = parse_manifest((exported / layout.MANIFEST).read_bytes())
    found = digests(exported)
    found.pop(layout.MANIFEST)
    assert {name: entry.blake3 for name, entry in manifest.files.items()} == found
    for name, entry in manifest.files.items():
        data = (exported / name).read_bytes()
        expert = name.startswith("experts/")
        seed = layout.expert_identity(int(name[14:16]), int(name[24:27])) if expert else 0
        assert (entry.bytes, entry.xxh3) == (len(data), xxhash.xxh3_64_hexdigest(data, seed)), name
    assert manifest.graphs == ("fp16", "fp32")
    assert manifest.source.name == "model"


def test_dense_data_starts_on_a_page(exported: Path) -> None:
    for file in (exported / "dense").glob("*.safetensors"):
        length = int.from_bytes(file.read_bytes()[:8], "little")
        assert (8 + length) % layout.PAGE_BYTES == 0, file


@pytest.mark.parametrize("arrangement", [{"shards": 3}, {"fused": True}, {"fused": True, "shards": 4}])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_arrangement_of_a_checkpoint_gives_the_same_files(
    family: str, arrangement: dict[str, Any], tmp_path: Path
) -> None:
    size = {"num_hidden_layers": 1}
    plain = export_bundle(make_checkpoint(tmp_path / "a", family, **size), tmp_path / "A", NO_GRAPHS)
    other = make_checkpoint(tmp_path / "b", family, **size, **arrangement)
    assert export_bundle(other, tmp_path / "B", NO_GRAPHS).files == plain.files


def test_precision_of_the_checkpoint_does_not_matter_when_values_are_equal(tmp_path: Path) -> None:
    bf16 = make_checkpoint(tmp_path / "bf16", "olmoe", dtype="bf16", num_hidden_layers=1)
    files = export_bundle(bf16, tmp_path / "A", NO_GRAPHS).files
    for dtype in (torch.float16, torch.float32):
        path = tmp_path / str(dtype)
        shutil.copytree(bf16, path)
        write_weights(path, {n: t.to(dtype) for n, t in load_file(bf16 / "model.safetensors").items()})
        assert export_bundle(path, tmp_path / f"{dtype}.out", NO_GRAPHS).files == files


def test_a_header_of_odd_length_is_read_right(small: Path, tmp_path: Path) -> None:
    path = shutil.copytree(small, tmp_path / "ck")
    data = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    odd = data[8 : 8 + length] + b" " * (1 + length % 2)
    (path / "model.safetensors").write_bytes(len(odd).to_bytes(8, "little") + odd + data[8 + length :])
    assert len(odd) % 2 == 1
    plain = export_bundle(small, tmp_path / "A", NO_GRAPHS)
    assert export_bundle(path, tmp_path / "B", NO_GRAPHS).files == plain.files


@pytest.mark.parametrize("workers", [1, 7])
def test_two_exports_are_equal_byte_for_byte(workers: int, small: Path, exported: Path, tmp_path: Path) -> None:
    export_bundle(small, tmp_path / "out", ExportOptions(workers=workers, name="model"))
    assert digests(tmp_path / "out") == digests(exported)


def test_tied_embeddings(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "ck", "olmoe", tie_word_embeddings=True, num_hidden_layers=1)
    manifest = export_bundle(path, tmp_path / "A", NO_GRAPHS)
    assert manifest.config.tied_embeddings
    assert set(load_file(tmp_path / "A" / layout.HEAD_FILE)) == {"norm"}
    tensors = load_file(path / "model.safetensors")
    write_weights(path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert export_bundle(path, tmp_path / "B", NO_GRAPHS).files == manifest.files
    write_weights(path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head.weight differs"):
        export_bundle(path, tmp_path / "C", NO_GRAPHS)


def test_the_tokenizer_comes_along(small: Path, exported: Path) -> None:
    copied = exported / "tokenizer"
    assert (copied / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    source = json.loads((small / "tokenizer_config.json").read_text())
    assert (copied / "chat_template.jinja").read_text() == source["chat_template"]
    assert json.loads((copied / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert json.loads((copied / "generation_config.json").read_text())["top_p"] == 0.9
    bundle = Bundle.open(exported)
    assert bundle.config.eos_token_ids == (2,)
    bundle.close()


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ([{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}], "D"),
        ([{"name": "tool", "template": "T"}], "T"),
        (None, None),
    ],
)
def test_chat_templates_of_older_checkpoints(template: Any, wanted: str | None, small: Path, tmp_path: Path) -> None:
    path = shutil.copytree(small, tmp_path / "ck")
    # Published settings hold an integer beyond 64 bits.
    settings = {"model_max_length": 10**30, "chat_template": template, "eos_token": {"content": "</s>"}}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    export_bundle(path, tmp_path / "out", NO_GRAPHS)
    copied = tmp_path / "out/tokenizer"
    assert (copied / "chat_template.jinja").exists() == (wanted is not None)
    if wanted is not None:
        assert (copied / "chat_template.jinja").read_text() == wanted
    assert json.loads((copied / "tokenizer_config.json").read_text()) == {"eos_token": {"content": "</s>"}}


def test_a_checkpoint_without_tokenizer_exports(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "ck", "olmoe", num_hidden_layers=1)
    manifest = export_bundle(path, tmp_path / "out", NO_GRAPHS)
    assert not any(name.startswith("tokenizer/") for name in manifest.files)


def test_progress_ends_at_the_total(small: Path, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    manifest = export_bundle(small, tmp_path / "out", NO_GRAPHS, events.append)
    total = sum(entry.bytes for entry in manifest.files.values())
    assert (events[-1].done_bytes, events[-1].total_bytes, events[-1].reused_bytes) == (total, total, 0)
    assert {event.path for event in events} == set(manifest.files)


def test_an_existing_target_is_refused_untouched(small: Path, tmp_path: Path) -> None:
    for make in (Path.mkdir, Path.touch, lambda p: p.symlink_to("nowhere")):
        out = tmp_path / "out"
        make(out)
        for force in (False, True):
            with pytest.raises(UsageError, match="exists already" if not force else "is no bundle"):
                export_bundle(small, out, ExportOptions(graphs=(), force=force))
        assert os.listdir(tmp_path) == ["out"]
        out.rmdir() if out.is_dir() else out.unlink()
    with pytest.raises(UsageError, match="mkdir -p"):
        export_bundle(small, tmp_path / "no/such/out", NO_GRAPHS)


def test_force_replaces_a_bundle_only_when_the_new_one_is_whole(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    old_source = make_checkpoint(tmp_path / "old", "olmoe", num_hidden_layers=1)
    export_bundle(old_source, out, NO_GRAPHS)
    before = digests(out)
    broken = shutil.copytree(small, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    write_weights(broken, tensors)
    with pytest.raises(CheckpointError):
        export_bundle(broken, out, ExportOptions(graphs=(), force=True))
    assert digests(out) == before
    export_bundle(small, out, ExportOptions(graphs=(), force=True, name="model"))
    assert digests(out) != before
    assert sorted(os.listdir(tmp_path)) == ["broken", "old", "out"]  # no leftovers of either
