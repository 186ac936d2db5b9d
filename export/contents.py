"""What the files of a bundle consist of: bytes at hand, or tensors that are read and converted when their turn comes.

Every content can be asked for any range, so a writer needs one buffer and no content is ever whole in memory.
"""

from __future__ import annotations

import bisect
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from export.checkpoint import Checkpoint
from export.convert import TORCH_DTYPES, convert
from export.families.base import Rows
from export.headers import ITEM_BYTES, TensorInfo
from runtime.errors import CheckpointError

_BLOCK_VALUES = 1 << 19  # one read and conversion: what is read is in the processor's cache when it is converted


class Content(Protocol):
    """The bytes of a file."""

    def fill(self, start: int, target: memoryview) -> None:
        """Write the bytes from `start` on into `target`, all of it. Raises CheckpointError or EdgeError."""
        ...


@dataclass(frozen=True)
class PlannedFile:
    """One file to write; its xxh3 is seeded with `seed`."""

    path: str
    bytes: int
    content: Content
    seed: int = 0


@dataclass(frozen=True)
class Bytes:
    """A small file, made in memory."""

    data: bytes

    def fill(self, start: int, target: memoryview) -> None:
        """See Content.fill."""
        target[:] = self.data[start : start + len(target)]


class Tensors:
    """A header, then pieces of tensors converted to `dtype` ("F16" or "F32") without gaps, then zeros.

    `end` is where the zeros begin, in bytes.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str, header: bytes, rows: Iterable[Rows]) -> None:
        self._checkpoint, self._header, self._dtype = checkpoint, header, dtype
        self._item_bytes = ITEM_BYTES[dtype]
        # Piece i: values of tensor infos[i] from value firsts[i] on, at bytes starts[i] to starts[i + 1] of the file.
        # DeepSeek-V2 has half a million, the single rows of its interleaved rope: as objects they would be 130 MB.
        self._infos: list[TensorInfo] = []
        self._firsts, self._starts = array("q"), array("q", [len(header)])
        for run in rows:
            info, first, count = _piece(checkpoint, run)
            self._infos.append(info)
            self._firsts.append(first)
            self._starts.append(self._starts[-1] + count * self._item_bytes)
        self.end = self._starts[-1]

    def fill(self, start: int, target: memoryview) -> None:
        """See Content.fill."""
        end = start + len(target)
        if start < len(self._header):
            part = self._header[start:end]
            target[: len(part)] = part
        for piece in range(max(0, bisect.bisect_right(self._starts, start) - 1), len(self._infos)):
            begin, stop = max(start, self._starts[piece]), min(end, self._starts[piece + 1])
            if begin >= end:
                break
            if begin < stop:
                self._convert(piece, begin - self._starts[piece], target[begin - start : stop - start])
        if end > self.end:
            zeros = end - max(start, self.end)
            target[len(target) - zeros :] = bytes(zeros)

    def _convert(self, piece: int, begin: int, target: memoryview) -> None:
        first, count = self._firsts[piece] + begin // self._item_bytes, len(target) // self._item_bytes
        for done in range(0, count, _BLOCK_VALUES):
            size = min(_BLOCK_VALUES, count - done)
            block = target[done * self._item_bytes : (done + size) * self._item_bytes]
            self._convert_block(self._infos[piece], first + done, size, block)

    def _convert_block(self, info: TensorInfo, first: int, count: int, target: memoryview) -> None:
        item_bytes = ITEM_BYTES[info.dtype]
        raw = self._checkpoint.read(info, first * item_bytes, count * item_bytes)
        if info.offset % item_bytes:  # a header of odd length: torch wants values at their own multiple
            raw = memoryview(bytearray(raw))
        source = torch.frombuffer(raw, dtype=TORCH_DTYPES[info.dtype])
        result = torch.frombuffer(target, dtype=TORCH_DTYPES[self._dtype])
        convert(source, result, f"{info.file}: tensor {info.name}, values {first} to {first + count - 1} of it,")


def _piece(checkpoint: Checkpoint, rows: Rows) -> tuple[TensorInfo, int, int]:
    """The tensor of `rows`, checked, the first of its values and their count. Raises CheckpointError."""
    info = checkpoint.tensors.get(rows.name)
    if info is None:
        raise CheckpointError(f"{checkpoint.path}: tensor {rows.name} is missing: incomplete, or another architecture")
    where = f"{info.file}: tensor {rows.name}"
    if info.shape != rows.shape:
        raise CheckpointError(f"{where} has shape {list(info.shape)}, config.json asks for {list(rows.shape)}")
    if info.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{where} has dtype {info.dtype}, not one of {', '.join(TORCH_DTYPES)}: not supported")
    width = rows.shape[-1] if len(rows.shape) > 1 else 1
    total = math.prod(rows.shape) // width
    count = total - rows.first if rows.count is None else rows.count
    return info, rows.first * width, count * width
