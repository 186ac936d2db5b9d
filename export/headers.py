"""Headers of safetensors files: those of a checkpoint, read without trusting them, and those we write.

A file is 8 bytes of little-endian header length, a JSON header, then the data, without holes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any

from runtime.errors import BundleError, CheckpointError
from runtime.layout import PAGE_BYTES
from runtime.strict import parse_json

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` is absolute, in bytes; `dtype` as safetensors spells it ("BF16")."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


def read_header(descriptor: int, file: str) -> tuple[bytes, dict[str, TensorInfo]]:
    """The raw header and the tensors of an open safetensors file.

    Raises CheckpointError naming the file (and tensor) when the header is malformed, or when the file is shorter or
    longer than its header says.
    """
    size = os.fstat(descriptor).st_size
    start = os.pread(descriptor, 8, 0)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(
            f"{file}: truncated, or no safetensors file ({size} bytes, a header of {length}): download it again"
        )
    raw = os.pread(descriptor, length, 8)
    try:
        entries = parse_json(raw, file)
    except BundleError as error:
        raise CheckpointError(f"{error}: the header is damaged, download it again") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: the safetensors header is no object")
    entries.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, file, 8 + length) for name, entry in entries.items()}
    _check_data(tensors, file, 8 + length, size)
    return raw, tensors


def build_header(dtype: str, shapes: dict[str, tuple[int, ...]]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header of a bundle file whose tensors follow each other in the order of `shapes`, all of one dtype.

    Returns its bytes (length included, padded with spaces so that the data starts on a page) and each tensor's
    absolute offset and length in bytes.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    total = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES
    header = (total - 8).to_bytes(8, "little") + text.ljust(total - 8)
    spans = {n: (total + e["data_offsets"][0], e["data_offsets"][1] - e["data_offsets"][0]) for n, e in entries.items()}
    return header, spans


def _tensor(name: str, entry: Any, file: str, data_start: int) -> TensorInfo:
    where = f"{file}: tensor {name!r:.100}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its header entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: dtype {dtype!r:.40} is not known (known: {', '.join(ITEM_BYTES)})")
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise CheckpointError(f"{where}: shape {shape!r:.80} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int for n in offsets):
        raise CheckpointError(f"{where}: data_offsets {offsets!r:.80} are not two numbers")
    begin, end = offsets
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if not 0 <= begin <= end or end - begin != wanted:
        raise CheckpointError(f"{where}: data_offsets {offsets} do not hold {wanted} bytes ({dtype} {shape})")
    return TensorInfo(name, file, dtype, tuple(shape), data_start + begin, wanted)


def _check_data(tensors: dict[str, TensorInfo], file: str, data_start: int, size: int) -> None:
    end = data_start
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.bytes)):
        if info.offset != end:
            problem = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{file}: tensor {info.name!r:.100} {problem}: the header is damaged")
        end += info.bytes
    if end > size:
        raise CheckpointError(f"{file}: truncated: {size} bytes, its header says {end}: download it again")
    if end < size:
        raise CheckpointError(f"{file}: {size - end} bytes after the last tensor: the file is damaged")
