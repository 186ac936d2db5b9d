"""A Hugging Face checkpoint with tuned gates: a copy in which nothing but the gates differs.

Every other tensor, and every other file, has the bytes of the original. transformers, vLLM and llama.cpp's converter
read the copy as they read the original. Gates are written as fp32 by default: llama.cpp keeps them so, and what loads
them in a narrower dtype rounds them itself, to the values that writing that dtype would give.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from export.checkpoint import INDEX, Checkpoint
from export.families import family_of, read_model
from export.headers import ITEM_BYTES, TensorInfo
from export.source import read_json
from runtime.config import ModelConfig
from runtime.errors import CheckpointError, EdgeError, UsageError
from runtime.layout import router_tensors
from runtime.private_files import sync
from runtime.router import choose
from runtime.router_file import check_base, gates_sha256, load_router

GateDtype = Literal["fp32", "same"]
PROVENANCE = "remoe_router.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx")
_CHUNK_BYTES = 8 << 20
_SAMPLES = 2048


@dataclass(frozen=True)
class HfExport:
    """What was written. `rounded` is the share of chosen experts that differ, over random inputs, once gates are
    rounded to `narrow_dtype`, the dtype of the checkpoint's own gates (0 where that is fp32).
    """

    files: int
    bytes: int
    gates: int
    narrow_dtype: str
    rounded: float
    left_out: tuple[str, ...]


def export_hf(
    checkpoint: str | Path,
    out: Path,
    router: Path,
    gate_dtype: GateDtype = "fp32",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HfExport:
    """Copy a checkpoint folder (or hub name) to the new folder `out`, with the gates of a router file.

    `progress` is told bytes done and bytes in all. `out` appears complete or not at all. Raises CheckpointError for a
    checkpoint that cannot be, BundleError for gates of another model, UsageError for an `out` that exists, EdgeError
    when a disk fails.
    """
    _check_target(out)
    with Checkpoint.open(checkpoint) as source:
        config = read_model(source.config, source.generation)
        places = _places(source, config)
        stock = {name: _read(source, info) for name, info in places.items()}
        tensors, provenance = load_router(router, router_tensors(config))
        check_base(provenance, gates_sha256(stock), router, source.path.resolve().name)
        changed = {places[n].name: t for n, t in tensors.items() if not torch.equal(t, stock[n])}
        extra = {PROVENANCE: provenance.to_json().encode() + b"\n"} if provenance is not None else {}
        writer = _Writer(source, out, changed, gate_dtype, progress)
        files, size = writer.write(extra)
        narrow = places[f"layer_{config.moe_layers[0]:02d}.weight"].dtype
        lost = _rounded(config, tensors, _DTYPES[narrow])
        return HfExport(files, size, len(changed), narrow.lower(), lost, writer.left_out)


def _check_target(out: Path) -> None:
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder; run: mkdir -p '{out.parent}'")
    if os.path.lexists(out):
        raise UsageError(f"{out}: exists already; choose another name, or remove it yourself")


def _places(source: Checkpoint, config: ModelConfig) -> dict[str, TensorInfo]:
    """Where each tensor of a router file lies in the checkpoint. Raises CheckpointError."""
    family, places = family_of(source.config), {}
    for layer in config.moe_layers:
        for name, (rows,) in family.router(config, layer, source.tensors).items():
            info = source.tensors.get(rows.name)
            if info is None or info.shape != rows.shape:
                raise CheckpointError(f"{source.path}: {rows.name} is missing, or not of the shape {list(rows.shape)}")
            if info.dtype not in _DTYPES:
                raise CheckpointError(
                    f"{source.path}: {rows.name} has dtype {info.dtype} (known: {', '.join(_DTYPES)})"
                )
            places[name] = info
    return places


def _read(source: Checkpoint, info: TensorInfo) -> Tensor:
    flat = torch.frombuffer(bytearray(source.read(info, 0, info.bytes)), dtype=_DTYPES[info.dtype])
    return flat.float().view(info.shape)


class _Writer:
    """Copies a checkpoint folder into a staging folder beside `out`, then renames it."""

    def __init__(
        self,
        source: Checkpoint,
        out: Path,
        changed: dict[str, Tensor],
        gate_dtype: GateDtype,
        progress: Callable[[int, int], None],
    ) -> None:
        self._source, self._out, self._changed, self._progress = source, out, changed, progress
        self._dtypes = {n: "F32" if gate_dtype == "fp32" else source.tensors[n].dtype for n in changed}
        self._staged = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
        names = sorted(p.name for p in source.path.iterdir() if p.is_file())
        self.left_out = tuple(n for n in names if n.endswith(_PICKLES) or n == PROVENANCE)
        self._names = [n for n in names if n not in self.left_out]
        self._total = sum((source.path / n).stat().st_size for n in self._names)
        self._done = 0

    def write(self, extra: dict[str, bytes]) -> tuple[int, int]:
        """Everything; the number of files and their bytes."""
        free = shutil.disk_usage(self._out.parent).free
        if free < self._total:
            raise UsageError(
                f"{self._out.parent}: {self._total:,} bytes are needed, {free:,} are free: free some space or export "
                "to another disk"
            )
        touched = {self._source.tensors[name].file for name in self._changed}
        grown = 0
        try:
            self._staged.mkdir()
            for name in self._names:
                if name in touched:
                    grown += self._rewrite(name)
                elif name != INDEX:
                    self._put(name, self._chunks(name, 0, (self._source.path / name).stat().st_size))
            if INDEX in self._names:
                self._put(INDEX, iter([self._index(grown)]))
            for name, data in extra.items():
                self._put(name, iter([data]))
            return self._publish()
        except OSError as error:
            raise EdgeError(f"{self._staged}: {error.strerror}: nothing is left behind") from error
        finally:
            shutil.rmtree(self._staged, ignore_errors=True)

    def _publish(self) -> tuple[int, int]:
        sizes = [path.stat().st_size for path in self._staged.iterdir()]
        sync(self._staged)
        if os.path.lexists(self._out):
            raise UsageError(f"{self._out}: appeared meanwhile; choose another name")
        self._staged.rename(self._out)
        sync(self._out.parent)
        return len(sizes), sum(sizes)

    def _rewrite(self, file: str) -> int:
        """A shard with other gates; by how many bytes its tensors have grown."""
        path = self._source.path / file
        raw = _head(path)
        header: dict[str, Any] = json.loads(raw)
        infos = sorted((i for i in self._source.tensors.values() if i.file == file), key=lambda i: (i.offset, i.bytes))
        end, before = 0, sum(info.bytes for info in infos)
        for info in infos:
            dtype = self._dtypes.get(info.name, info.dtype)
            size = info.bytes // ITEM_BYTES[info.dtype] * ITEM_BYTES[dtype]
            header[info.name] = {**header[info.name], "dtype": dtype, "data_offsets": [end, end + size]}
            end += size
        if end == before:
            start = raw  # same dtypes: the header stays as it is, byte for byte
        else:
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            start = text.ljust(-(-len(text) // 8) * 8)

        def data() -> Iterator[bytes | memoryview]:
            yield len(start).to_bytes(8, "little") + start
            for info in infos:
                if info.name in self._changed:
                    yield _bytes(self._changed[info.name], _DTYPES[self._dtypes[info.name]])
                    self._advance(info.bytes)
                else:
                    yield from self._chunks(file, info.offset, info.bytes)

        self._put(file, data())
        return end - before

    def _index(self, grown: int) -> bytes:
        """The index; its total size is the one thing that may change."""
        path = self._source.path / INDEX
        index = read_json(path)
        total = index.get("metadata", {}).get("total_size") if isinstance(index.get("metadata"), dict) else None
        if not grown or type(total) is not int:
            return path.read_bytes()
        index["metadata"]["total_size"] = total + grown
        return json.dumps(index, indent=2).encode() + b"\n"

    def _chunks(self, name: str, start: int, size: int) -> Iterator[bytes]:
        with (self._source.path / name).open("rb", buffering=0) as file:
            file.seek(start)
            while size:
                part = file.read(min(size, _CHUNK_BYTES))
                if not part:
                    raise EdgeError(f"{self._source.path / name}: became shorter while it was read")
                size -= len(part)
                self._advance(len(part))
                yield part

    def _put(self, name: str, data: Iterator[bytes | memoryview]) -> None:
        with (self._staged / name).open("xb", buffering=0) as file:
            for part in data:
                view = memoryview(part)
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())

    def _advance(self, size: int) -> None:
        self._done += size
        self._progress(min(self._done, self._total), self._total)


def _head(path: Path) -> bytes:
    """The header text of a safetensors file that has been checked."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _bytes(values: Tensor, dtype: torch.dtype) -> bytes:
    return values.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def _rounded(config: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype) -> float:
    """Share of chosen experts that differ when gates are rounded, over random inputs of every layer."""
    if dtype == torch.float32:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(_SAMPLES, config.hidden_size, generator=generator)
    different = total = 0
    for layer in config.moe_layers:
        weight, bias = tensors[f"layer_{layer:02d}.weight"], tensors.get(f"layer_{layer:02d}.choice_bias")
        exact, _ = choose(config.router, h @ weight.T, bias)
        near, _ = choose(config.router, h @ weight.to(dtype).float().T, bias)
        same = (exact[:, :, None] == near[:, None, :]).any(-1).sum()
        different += exact.numel() - int(same)
        total += exact.numel()
    return different / total
