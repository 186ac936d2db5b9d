"""Damage in any file of a bundle is found and named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from export.exporter import export_bundle
from export.verify import verify_bundle
from runtime import layout
from runtime.errors import BundleError
from tests.checkpoints import make_checkpoint

EMBED, HEAD, LAYER, ROUTER = layout.EMBED_FILE, layout.HEAD_FILE, layout.layer_file(0), layout.BASE_ROUTER
BLOB, OTHER_BLOB = layout.expert_file(0, 1), layout.expert_file(1, 2)
GRAPH, TOKENIZER = layout.graph_file("layer_00", "fp32"), "tokenizer/tokenizer.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify")
    source = make_checkpoint(path / "ck", "qwen2_moe", tokenizer=True, vocab_size=300, num_hidden_layers=2)
    export_bundle(source, path / "out")
    return path / "out"


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "b")


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_name("x"))
    other.rename(one)
    one.with_name("x").rename(other)


def problems(path: Path, full: bool) -> tuple[str, ...]:
    return verify_bundle(path, full=full).problems


def test_a_whole_bundle_passes(bundle: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_bundle(bundle, progress=lambda done, total: seen.append((done, total)))
    assert report.problems == ()
    assert report.files == sum(p.is_file() for p in bundle.rglob("*")) - 1
    assert seen[-1] == (report.bytes, report.bytes)
    assert problems(bundle, full=False) == ()


@pytest.mark.parametrize("name", [EMBED, HEAD, LAYER, ROUTER, BLOB, OTHER_BLOB, GRAPH, TOKENIZER])
def test_one_flipped_bit_in_any_file_is_found(name: str, bundle: Path) -> None:
    flip(bundle / name)
    assert problems(bundle, full=False) == ()  # the price of being quick
    found = problems(bundle, full=True)
    assert len(found) == 1
    assert name in found[0]
    assert "blake3 and xxh3 differ" in found[0]


def test_every_page_of_a_blob_is_covered(bundle: Path) -> None:
    size = (bundle / BLOB).stat().st_size
    assert size >= 2 * layout.PAGE_BYTES
    for position in range(0, size, layout.PAGE_BYTES):
        flip(bundle / BLOB, position)
        assert len(problems(bundle, full=True)) == 1, position
        flip(bundle / BLOB, position)


@pytest.mark.parametrize("name", [EMBED, HEAD, LAYER, ROUTER, BLOB, GRAPH, TOKENIZER])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "missing"),
        (lambda p: os.truncate(p, p.stat().st_size - 1), "bytes on disk"),
        (lambda p: os.truncate(p, 0), "0 bytes on disk"),
        (lambda p: p.open("ab").write(b"x"), "bytes on disk"),
        (lambda p: (p.rename(p.with_suffix(".y")), p.symlink_to(p.with_suffix(".y"))), "link"),
        (lambda p: os.link(p, p.parent.parent.parent / "elsewhere"), "2 links"),
        (lambda p: (p.unlink(), p.mkdir()), "not a regular file"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "not a regular file"),
    ],
    ids=["missing", "short", "empty", "long", "symlink", "hardlink", "directory", "fifo"],
)
def test_quick_finds_whatever_is_not_the_listed_file(
    name: str, damage: Callable[[Path], object], words: str, bundle: Path
) -> None:
    damage(bundle / name)
    for full in (False, True):
        found = [p for p in problems(bundle, full) if p.startswith(name)]
        assert len(found) == 1
        assert words in found[0]


def test_a_folder_behind_a_link_is_found(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "experts", tmp_path / "experts")
    (bundle / "experts").symlink_to(tmp_path / "experts")
    found = problems(bundle, full=False)
    assert len(found) == 14  # 2 layers of 7 experts
    assert all("lies behind one" in p for p in found)


def test_swapped_blobs_of_equal_size_are_found(bundle: Path) -> None:
    swap(bundle / BLOB, bundle / OTHER_BLOB)
    assert [p.split(":")[0] for p in problems(bundle, full=True)] == [BLOB, OTHER_BLOB]


def test_swapped_blobs_are_found_even_with_their_own_blake3(bundle: Path) -> None:
    swap(bundle / BLOB, bundle / OTHER_BLOB)
    manifest = json.loads((bundle / layout.MANIFEST).read_text())
    files = manifest["files"]
    files[BLOB], files[OTHER_BLOB] = files[OTHER_BLOB], files[BLOB]
    (bundle / layout.MANIFEST).write_text(json.dumps(manifest))
    found = problems(bundle, full=True)
    assert [p.split(":")[0] for p in found] == [BLOB, OTHER_BLOB]
    assert all("its xxh3 differ" in p for p in found)  # seeded with the place where it belongs


@pytest.mark.parametrize("name", ["extra", "experts/layer_00/expert_999.fp16", "dense/x/y"])
def test_a_file_too_many_is_found(name: str, bundle: Path) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).touch()
    found = problems(bundle, full=False)
    assert all("not listed" in p for p in found)
    assert any(p.startswith(name) for p in found)


def test_an_expert_that_the_manifest_forgot_is_no_bundle(bundle: Path) -> None:
    manifest = json.loads((bundle / layout.MANIFEST).read_text())
    del manifest["files"][BLOB]
    (bundle / layout.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"{BLOB} is missing"):
        verify_bundle(bundle)


def test_a_graph_that_the_manifest_forgot_is_found(bundle: Path) -> None:
    manifest = json.loads((bundle / layout.MANIFEST).read_text())
    del manifest["files"][GRAPH]
    (bundle / layout.MANIFEST).write_text(json.dumps(manifest))
    (bundle / GRAPH).unlink()
    assert problems(bundle, full=False) == (
        f"{GRAPH}: manifest.json promises fp32 graphs, but does not list it: export again",
    )


def shift_first(header: dict) -> None:
    first = next(iter(header.values()))
    first["data_offsets"] = [first["data_offsets"][0] + 2, first["data_offsets"][1] + 2]


def rename_first(header: dict) -> None:
    first = next(iter(header))
    items = {("y" + k if k == first else k): v for k, v in header.items()}
    header.clear()
    header.update(items)


def reorder(header: dict) -> None:
    items = dict(reversed(header.items()))
    header.clear()
    header.update(items)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (LAYER, shift_first, "starts at byte 2 of the data, expected 0"),
        (LAYER, rename_first, "yattn_norm"),
        (LAYER, reorder, "expected ['attn_norm'"),
        (LAYER, lambda h: h["qkv"].update(shape=[64, 128]), "qkv: shape [64, 128], expected [128, 64]"),
        (LAYER, lambda h: h["qkv"].update(dtype="BF16"), "BF16"),
        (ROUTER, lambda h: h["layer_00.weight"].update(dtype="F16"), "layer_00.weight"),
        (EMBED, lambda h: h["embed"].update(extra=1), "malformed"),
        (HEAD, lambda h: h["head"].update(data_offsets=[0, True]), "malformed"),
    ],
)
def test_headers_that_are_not_the_layout_are_found_quickly(
    name: str, change: Callable[[dict], object], words: str, bundle: Path
) -> None:
    data = (bundle / name).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    (bundle / name).write_bytes(data[:8] + text + data[8 + length :])
    found = problems(bundle, full=False)
    assert len(found) == 1
    assert name in found[0]
    assert words in found[0]


@pytest.mark.parametrize("make", [lambda p: None, Path.mkdir, Path.touch])
def test_what_is_no_bundle(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "b")
    with pytest.raises(BundleError, match="edge export"):
        verify_bundle(tmp_path / "b")
