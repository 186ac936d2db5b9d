"""manifest.json is read without trusting it: whatever is not exactly right is refused, and the field is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.families import parse_config
from runtime import layout
from runtime.errors import BundleError
from runtime.manifest import (
    FORMAT_VERSION,
    MAX_MANIFEST_BYTES,
    ExpertLayout,
    FileEntry,
    Manifest,
    Source,
    parse_manifest,
    required_files,
)

BLOB = layout.expert_file(1, 2)
TINY = {
    "model_type": "olmoe",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "vocab_size": 40,
    "hidden_act": "silu",
}


def manifest() -> Manifest:
    config = parse_config(TINY)
    blob = ExpertLayout("fp16", 3 * 32 * 48 * 2, 12288)  # 9,216 bytes of values, three pages
    files = {
        name: FileEntry(blob.file_bytes if name.startswith("experts/") else 100, "0" * 64, "f" * 16)
        for name in required_files(config)
    }
    return Manifest(FORMAT_VERSION, "test", Source("tiny", "a" * 64), config, blob, ("fp16",), files)


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    value = json.loads(manifest().to_json())
    change(value)
    return json.dumps(value).encode()


def text_edited(old: str, new: str) -> bytes:
    text = manifest().to_json().decode()
    assert text.count(old) >= 1
    return text.replace(old, new, 1).encode()


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(whole: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            whole = whole[name]
        whole[last] = value

    return change


def named(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["files"].update({name: m["files"][layout.EMBED_FILE]})


def manifest_or_refusal(data: bytes) -> Manifest | str:
    try:
        return parse_manifest(data)
    except BundleError as error:
        return str(error)


def test_round_trip() -> None:
    assert parse_manifest(manifest().to_json()) == manifest()
    assert manifest().to_json() == manifest().to_json()


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "not UTF-8": (b"\xff\xfe", "not valid JSON"),
    "cut off": (manifest().to_json()[:-20], "not valid JSON"),
    "a list": (b"[]", "format_version"),
    "too large": (b" " * (MAX_MANIFEST_BYTES + 1), "more than"),
    "nested 100,000 deep": (b"[" * 100_000 + b"]" * 100_000, "JSON"),
    "many values": (b"[" + b"[]," * 300_000 + b"[]]", "nested values"),
    "integer of 5,000 digits": (text_edited('"vocab_size": 40', '"vocab_size": ' + "9" * 5000), "5000 digits"),
    "size of 2^63": (edited(lambda m: m["files"][layout.EMBED_FILE].update(bytes=1 << 63)), "impossible size"),
    "a number for a file": (edited(lambda m: m["files"].update({BLOB: 0})), "object"),
    "duplicate key": (text_edited('"vocab_size": 40', '"vocab_size": 40, "vocab_size": 40'), "occurs twice"),
    "duplicate file": (text_edited(f'"{BLOB}"', f'"{layout.expert_file(1, 1)}"'), "occurs twice"),
    "NaN": (text_edited('"norm_eps": 1e-05', '"norm_eps": NaN'), "NaN"),
    "Infinity": (text_edited('"norm_eps": 1e-05', '"norm_eps": Infinity'), "Infinity"),
    "a float that overflows": (text_edited('"norm_eps": 1e-05', '"norm_eps": 1e999'), "finite"),
    "true as a number": (edited(put("config.num_layers", True)), "config.num_layers"),
    "float as an integer": (edited(put("config.hidden_size", 32.0)), "config.hidden_size"),
    "text as a number": (edited(put("config.hidden_size", "32")), "config.hidden_size"),
    "number as a flag": (edited(put("config.tied_embeddings", 0)), "config.tied_embeddings"),
    "null where none may be": (edited(put("config.family", None)), "config.family"),
    "unknown key at the top": (edited(put("extra", 1)), "'extra'"),
    "unknown key in the config": (edited(put("config.sliding_window", 1)), "'sliding_window'"),
    "unknown key in a file": (edited(lambda m: m["files"][BLOB].update(mode=7)), "'mode'"),
    "missing key": (edited(lambda m: m.pop("source")), "'source' is missing"),
    "missing config key": (edited(lambda m: m["config"].pop("rope")), "'rope' is missing"),
    "unknown word": (edited(put("config.activation", "relu")), "config.activation"),
    "no format_version": (edited(lambda m: m.pop("format_version")), "format_version is None"),
    "format_version 0": (edited(put("format_version", 0)), "format_version is 0"),
    "format_version 1": (edited(put("format_version", 1)), "made by an older release"),
    "format_version 3": (edited(put("format_version", 3)), "made by a newer release"),
    "format_version true": (edited(put("format_version", True)), "format_version is True"),
    "format_version 1.0": (edited(put("format_version", 1.0)), "format_version is 1.0"),
    "negative size": (edited(lambda m: m["files"][layout.EMBED_FILE].update(bytes=-1)), "impossible size"),
    "size beyond any disk": (edited(lambda m: m["files"][layout.EMBED_FILE].update(bytes=1 << 62)), "impossible size"),
    "short blake3": (edited(lambda m: m["files"][BLOB].update(blake3="0" * 63)), "blake3"),
    "blake3 with capitals": (edited(lambda m: m["files"][BLOB].update(blake3="A" * 64)), "blake3"),
    "xxh3 no hex": (edited(lambda m: m["files"][BLOB].update(xxh3="g" * 16)), "xxh3"),
    "expert missing": (edited(lambda m: m["files"].pop(BLOB)), BLOB),
    "head missing": (edited(lambda m: m["files"].pop(layout.HEAD_FILE)), layout.HEAD_FILE),
    "blob of another size": (edited(lambda m: m["files"][BLOB].update(bytes=4096)), "expected 12288"),
    "expert layout smaller": (edited(put("expert.bytes", 9214)), "9216 bytes"),
    "expert padding wrong": (edited(put("expert.file_bytes", 16384)), "12288 padded"),
    "unknown expert dtype": (edited(put("expert.dtype", "int3")), "int3"),
    "zero dimension": (edited(put("config.expert_intermediate_size", 0)), "expert_intermediate_size"),
    "dimension of 2^31": (edited(put("config.hidden_size", 1 << 31)), "hidden_size"),
    "product beyond 64 bits": (
        edited(lambda m: m["config"].update(hidden_size=(1 << 31) - 1, expert_intermediate_size=(1 << 31) - 1)),
        "expert",
    ),
    "top_k above the experts": (edited(put("config.router.top_k", 4)), "top_k"),
    "layer list not ascending": (edited(put("config.moe_layers", [1, 0])), "moe_layers"),
    "layer beyond the last": (edited(put("config.moe_layers", [0, 2])), "moe_layers"),
    "negative intermediate size": (edited(put("config.shared_intermediate_size", -8)), "shared_intermediate_size"),
    "a million experts": (edited(put("config.router.num_experts", 1 << 30)), "num_experts"),
}
NAMES = [
    "../x",
    "/etc/passwd",
    "a/../b",
    "a//b",
    "./a",
    "a/.",
    "",
    "a\0b",
    "a\nb",
    "x" * 300,
    "a\\b",
    "tokenizer/\u0430",
    "a/b/c/d",
]


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_manifests_are_refused(name: str) -> None:
    data, words = MALFORMED[name]
    with pytest.raises(BundleError) as error:
        parse_manifest(data)
    assert words in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", [*NAMES, "manifest.json"])
def test_names_that_are_no_plain_relative_path(name: str) -> None:
    with pytest.raises(BundleError, match=r"manifest.json.files: "):
        parse_manifest(edited(named(name)))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_give_a_typed_error(data: bytes) -> None:
    with pytest.raises(BundleError):
        parse_manifest(data)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(manifest().to_json()) - 1), st.integers(0, 255))
def test_one_changed_byte_gives_a_manifest_or_a_typed_error(position: int, byte: int) -> None:
    data = bytearray(manifest().to_json())
    data[position] = byte
    assert manifest_or_refusal(bytes(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_field_replaced_by_anything(data: st.DataObject) -> None:
    whole = json.loads(manifest().to_json())
    parent: Any = whole
    while True:
        key = data.draw(st.sampled_from(sorted(parent))) if isinstance(parent, dict) else 0
        if not isinstance(parent[key], (dict, list)) or not parent[key] or data.draw(st.booleans()):
            break
        parent = parent[key]
    parent[key] = data.draw(JSON)
    assert manifest_or_refusal(json.dumps(whole).encode())
