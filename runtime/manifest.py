"""manifest.json: what a bundle contains, read without trusting it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.config import ModelConfig
from runtime.errors import BundleError
from runtime.layout import (
    BASE_ROUTER,
    EMBED_FILE,
    HEAD_FILE,
    MANIFEST,
    expert_bytes,
    expert_file,
    layer_file,
    padded,
)
from runtime.strict import from_dict, parse_json, to_dict

FORMAT_VERSION = 2  # 1 had SHA-256 in place of BLAKE3
MAX_MANIFEST_BYTES = 16 << 20
_HEX = set("0123456789abcdef")


@dataclass(frozen=True)
class FileEntry:
    """One file: size, BLAKE3 and xxh3-64, both in hex. A blob's xxh3 is seeded with its expert's identity."""

    bytes: int
    blake3: str
    xxh3: str


@dataclass(frozen=True)
class ExpertLayout:
    """The record of one expert: `bytes` of values (gate, up, down, row-major), padded with zeros to `file_bytes`."""

    dtype: str
    bytes: int
    file_bytes: int


@dataclass(frozen=True)
class Source:
    """Where the weights came from. `fingerprint` is the SHA-256 over the checkpoint's headers and config."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json. `files` covers every other file of the bundle, by relative path."""

    format_version: int
    generator: str
    source: Source
    config: ModelConfig
    expert: ExpertLayout
    graphs: tuple[str, ...]  # compute dtypes with ONNX graphs
    files: dict[str, FileEntry]

    def to_json(self) -> bytes:
        """Deterministic bytes: equal bundles have equal manifests."""
        return (json.dumps(to_dict(self), indent=1, allow_nan=False) + "\n").encode()


def parse_manifest(data: bytes) -> Manifest:
    """Parse and check the bytes of manifest.json.

    Raises BundleError naming the field; another format_version says so.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"manifest.json: {len(data)} bytes, more than the {MAX_MANIFEST_BYTES} allowed")
    raw = parse_json(data, "manifest.json")
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if type(version) is not int or version < 1:
        raise BundleError(f"manifest.json: format_version is {version!r}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"manifest.json: format_version {version} was made by a newer release; this one reads up to "
            f"{FORMAT_VERSION}: upgrade remoe-edge, or export again"
        )
    if version < FORMAT_VERSION:
        raise BundleError(
            f"manifest.json: format_version {version} was made by an older release; this one reads {FORMAT_VERSION}: "
            "run edge export CHECKPOINT BUNDLE --force"
        )
    manifest = from_dict(Manifest, raw, "manifest.json")
    _check(manifest)
    return manifest


def required_files(config: ModelConfig) -> Iterator[str]:
    """Weight files that every bundle of this model must list, one by one: an untrusted config may ask for billions."""
    yield from (EMBED_FILE, HEAD_FILE, BASE_ROUTER)
    yield from (layer_file(layer) for layer in range(config.num_layers))
    yield from (expert_file(layer, e) for layer in config.moe_layers for e in range(config.router.num_experts))


def _check(manifest: Manifest) -> None:
    manifest.config.check()
    for path, entry in manifest.files.items():
        _check_path(path)
        _check_entry(path, entry)
    if manifest.expert.dtype != "fp16":
        raise BundleError(f"manifest.json.expert.dtype: {manifest.expert.dtype!r} is not supported (known: fp16)")
    values = expert_bytes(manifest.config)
    if manifest.expert != ExpertLayout("fp16", values, padded(values)):
        raise BundleError(
            f"manifest.json.expert: bytes {manifest.expert.bytes} / file_bytes {manifest.expert.file_bytes} do not "
            f"match the config, whose experts have {values} bytes, {padded(values)} padded"
        )
    for path in required_files(manifest.config):
        if path not in manifest.files:
            raise BundleError(f"manifest.json.files: {path} is missing")
        if path.startswith("experts/") and manifest.files[path].bytes != manifest.expert.file_bytes:
            raise BundleError(
                f"manifest.json.files: {path} has {manifest.files[path].bytes} bytes, expected "
                f"{manifest.expert.file_bytes}"
            )


def _check_path(path: str) -> None:
    parts = path.split("/")
    plain = path.isascii() and path.isprintable() and "\\" not in path and len(path) < 200
    if path == MANIFEST:
        raise BundleError(f"manifest.json.files: {path} cannot list itself")
    if not plain or len(parts) > 3 or any(p in ("", ".", "..") or p != os.path.basename(p) for p in parts):
        raise BundleError(f"manifest.json.files: {path!r:.100} is not a plain relative path")


def _check_entry(path: str, entry: FileEntry) -> None:
    if not 0 <= entry.bytes < 1 << 50:
        raise BundleError(f"manifest.json.files: {path} has an impossible size of {entry.bytes} bytes")
    for field, digest, digits in (("blake3", entry.blake3, 64), ("xxh3", entry.xxh3, 16)):
        if len(digest) != digits or not set(digest) <= _HEX:
            raise BundleError(f"manifest.json.files: {path} has a {field} that is not {digits} hex digits")
