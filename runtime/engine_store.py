"""The private store of TensorRT engines on this machine. An engine is executable code: only what this user built here,
from exactly these graphs and weights, with exactly this TensorRT on this GPU, is ever given out to be deserialised.

    $REMOE_EDGE_ENGINES, or ~/.cache/remoe-edge/engines     owner only (0700)
      secret                                                32 random bytes, made on first use
      MODEL-FINGERPRINT/PART-KEY.engine                     the engine as TensorRT serialised it
      MODEL-FINGERPRINT/PART-KEY.json                       what it was built from, its SHA-256, and a MAC over both

KEY is a hash of everything that an engine depends on, so a stale one is simply not found. The MAC is keyed with the
secret: an engine that was copied from another machine, or changed, is refused before TensorRT sees a byte of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.bundle import Bundle
from runtime.errors import BundleError, EdgeError, UsageError
from runtime.graph_io import dense_parts, weight_files
from runtime.layout import graph_file
from runtime.manifest import Manifest
from runtime.private_files import check_private, read_private, sync, write_private
from runtime.strict import parse_json

FORMAT_VERSION = 1
WORKSPACE_BYTES = 1 << 30
_KEY_DIGITS = 24
_MAX_SIDECAR_BYTES = 1 << 20


@dataclass(frozen=True)
class EngineLimits:
    """What an engine is built for. `context`: most rows of past; `prefill`: most tokens of one call."""

    context: int
    prefill: int
    workspace_bytes: int = WORKSPACE_BYTES


@dataclass(frozen=True)
class EngineKey:
    """Everything that an engine depends on. `sources` are the BLAKE3 of the graph and of its weight files."""

    part: str
    sources: dict[str, str]
    flavour: str
    version: str
    gpu: str  # name, compute capability and multiprocessors; or what a check builds for
    options: EngineLimits
    format_version: int = FORMAT_VERSION

    def digest(self) -> str:
        """Hex digits that name the engine."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]


@dataclass(frozen=True)
class StoredEngine:
    """An engine in the store; `facts` is what the builder wrote down about it."""

    path: Path
    bytes: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Target:
    """Who builds and for what. `capability` like "86" is a GPU that need not be there, None: this machine's."""

    flavour: str
    version: str
    gpu: str
    capability: str | None = None


def engine_keys(bundle: Bundle, target: Target, options: EngineLimits) -> dict[str, EngineKey]:
    """The key of every dense part. Raises UsageError when the bundle has no fp16 graphs."""
    manifest = bundle.manifest
    if "fp16" not in manifest.graphs:
        raise UsageError(
            f"{bundle.path} has no fp16 graphs (found: {', '.join(manifest.graphs) or 'none'}), from which engines are "
            "built: export it again with --graphs fp16"
        )
    keys = {}
    for part in dense_parts(bundle.config):
        files = (graph_file(part, "fp16"), *weight_files(bundle.config, part))
        sources = {file: manifest.files[file].blake3 for file in files}
        keys[part] = EngineKey(part, sources, target.flavour, target.version, target.gpu, options)
    return keys


class EngineStore:
    """The engines of one bundle's model. Raises UsageError when the store is not private to this user."""

    def __init__(self, manifest: Manifest, root: Path | None = None) -> None:
        self.root = root or default_root()
        name = re.sub(r"[^A-Za-z0-9._-]", "_", manifest.source.name).lstrip(".")[:80] or "model"
        self.folder = self.root / f"{name}-{manifest.source.fingerprint[:12]}"

    def find(self, key: EngineKey) -> StoredEngine | None:
        """The engine of exactly this key, or None. Its bytes are not looked at.

        Raises UsageError when its description is damaged or was written elsewhere.
        """
        path = self._path(key)
        if not path.with_suffix(".json").exists() or not path.exists():
            return None
        record = self._record(key, path)
        return StoredEngine(path, record["bytes"], record["facts"])

    def read(self, key: EngineKey) -> memoryview:
        """The bytes of an engine after every check, for deserialising. Raises UsageError when one of them fails."""
        path = self._path(key)
        record = self._record(key, path)
        data = read_private(path, record["bytes"])
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise UsageError(f"{path}: changed since it was built, so it is not loaded: {_again(path)}")
        return memoryview(data)

    def begin(self, key: EngineKey) -> Path:
        """Where a builder may write the engine of `key`; `commit` makes it one."""
        self._prepare()
        return self._path(key).with_suffix(".partial")

    def commit(self, key: EngineKey, facts: dict[str, Any]) -> StoredEngine:
        """Take what was written at `begin(key)` into the store: synced, then named, its description last."""
        path = self._path(key)
        partial = path.with_suffix(".partial")
        os.chmod(partial, 0o600)
        data = read_private(partial, partial.stat().st_size)
        digest = hashlib.sha256(data).hexdigest()
        record = {"key": asdict(key), "bytes": len(data), "sha256": digest, "facts": facts}
        record["mac"] = self._mac(record)
        sync(partial)
        os.replace(partial, path)
        sidecar = path.with_suffix(".json.partial")
        write_private(sidecar, json.dumps(record, indent=1).encode())
        os.replace(sidecar, path.with_suffix(".json"))
        sync(self.folder)
        return StoredEngine(path, len(data), facts)

    def built_options(self) -> list[EngineLimits]:
        """The options that engines of this model were built with, the smallest context first."""
        found = set()
        for sidecar in self.folder.glob("*.json") if self.folder.is_dir() else ():
            record = parse_json(read_private(sidecar, min(sidecar.stat().st_size, _MAX_SIDECAR_BYTES)), str(sidecar))
            try:
                found.add(EngineLimits(**record["key"]["options"]))
            except (TypeError, KeyError):
                continue  # of another release; `find` never meets it
        return sorted(found, key=lambda options: (options.context, options.prefill, options.workspace_bytes))

    def others(self, keys: list[EngineKey]) -> list[Path]:
        """Files of engines of this model that belong to none of `keys`: of another TensorRT, GPU, option or export."""
        wanted = {self._path(key).stem for key in keys}
        if not self.folder.is_dir():
            return []
        files = [path for path in self.folder.iterdir() if path.suffix in (".engine", ".json", ".partial")]
        return sorted(path for path in files if path.name.split(".")[0] not in wanted)

    def timing_cache(self, key: EngineKey) -> Path:
        """The file of kernel timings that equal layers share: one per TensorRT, GPU and store."""
        text = f"{key.flavour} {key.version} {key.gpu} {key.format_version}"
        return self.root / f"timing-{hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]}.cache"

    def read_timing_cache(self, key: EngineKey) -> bytes:
        """The timings, or nothing where there are none or they are not this user's own."""
        path = self.timing_cache(key)
        try:
            data = read_private(path, path.stat().st_size)
        except (OSError, EdgeError):
            return b""
        seal, timings = data[:32], data[32:]
        return timings if hmac.compare_digest(seal, self._seal(timings)) else b""

    def write_timing_cache(self, key: EngineKey, timings: bytes) -> None:
        """Keep the timings for the next engine."""
        path = self.timing_cache(key)
        partial = path.with_suffix(".partial")
        write_private(partial, self._seal(timings) + timings)
        os.replace(partial, path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one builder at a time. Raises UsageError when another one is at work."""
        self._prepare()
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(f"{self.folder}: another process builds engines of this model: wait for it") from None
        try:
            yield
        finally:
            os.close(descriptor)

    def _path(self, key: EngineKey) -> Path:
        return self.folder / f"{key.part}-{key.digest()}.engine"

    def _record(self, key: EngineKey, path: Path) -> dict[str, Any]:
        check_private(self.root)
        check_private(self.folder)
        sidecar = path.with_suffix(".json")
        if not sidecar.exists():
            raise UsageError(f"{path}: there is no such engine: run `edge engines BUNDLE`")
        try:
            record = parse_json(read_private(sidecar, min(sidecar.stat().st_size, _MAX_SIDECAR_BYTES)), str(sidecar))
            good = set(record) == {"key", "bytes", "sha256", "facts", "mac"} and record["key"] == asdict(key)
            good = good and hmac.compare_digest(str(record["mac"]), self._mac(record))
        except (BundleError, TypeError, KeyError):
            good = False
        if not good:
            raise UsageError(f"{path}: was not built here by this user, so it is not loaded: {_again(path)}")
        return dict(record)

    def _mac(self, record: dict[str, Any]) -> str:
        text = json.dumps({name: record[name] for name in ("key", "bytes", "sha256", "facts")}, sort_keys=True)
        return self._seal(text.encode()).hex()

    def _seal(self, data: bytes) -> bytes:
        return hmac.new(self._secret(), data, hashlib.sha256).digest()

    def _secret(self) -> bytes:
        path = self.root / "secret"
        try:
            return read_private(path, 32)
        except FileNotFoundError:
            self._prepare()
            write_private(path, secrets.token_bytes(32))
            return read_private(path, 32)

    def _prepare(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.mkdir(exist_ok=True, mode=0o700)
        check_private(self.root)
        check_private(self.folder)


def default_root() -> Path:
    """$REMOE_EDGE_ENGINES, or the user's cache directory."""
    chosen = os.environ.get("REMOE_EDGE_ENGINES")
    if chosen:
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "remoe-edge" / "engines"


def _again(path: Path) -> str:
    return f"remove {path.parent} and run `edge engines BUNDLE`"
