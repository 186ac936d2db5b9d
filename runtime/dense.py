"""Dense weights and routers: safetensors files of a bundle as torch tensors over one page-aligned buffer."""

from __future__ import annotations

import math
from typing import Any

import torch

from runtime.bundle import Bundle
from runtime.errors import BundleError
from runtime.strict import parse_json

_DTYPES = {"F16": torch.float16, "F32": torch.float32}
_MAX_HEADER_BYTES = 1 << 20


def load_tensors(bundle: Bundle, name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of a listed safetensors file, without a copy, after checking that they are exactly `shapes`.

    Raises BundleError naming file and tensor.
    """
    return view_tensors(bundle.read(name), name, shapes)


def view_tensors(data: memoryview, name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors over the bytes of a safetensors file; see load_tensors."""
    start, header = parse_header(data, name)
    if set(header) != set(shapes):
        raise BundleError(f"{name}: {_difference(set(shapes), set(header))}")
    tensors = {}
    for tensor, entry in header.items():
        dtype, begin, end = check_entry(entry, f"{name}: {tensor}", shapes[tensor], len(data) - start)
        count = (end - begin) // dtype.itemsize
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin)
        tensors[tensor] = flat.view(shapes[tensor])
    return tensors


def _difference(wanted: set[str], found: set[str]) -> str:
    """In a line, however many tensors there are."""
    parts = []
    for names, what in ((wanted - found, "lacks"), (found - wanted, "has too many:")):
        if names:
            first, *others = sorted(names)
            parts.append(f"{what} {first}" + (f" and {len(others)} more" if others else ""))
    return f"{', '.join(parts)}; {len(wanted)} tensors are expected, {len(found)} are there"


def parse_header(data: memoryview, name: str) -> tuple[int, dict[str, Any]]:
    """Offset of the data and the header's entries, without its __metadata__. Raises BundleError."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise BundleError(f"{name}: not a safetensors file (header of {length} bytes)")
    header = parse_json(bytes(data[8 : 8 + length]), name)
    if not isinstance(header, dict):
        raise BundleError(f"{name}: the header is no object")
    header.pop("__metadata__", None)
    return 8 + length, header


def check_entry(entry: Any, where: str, shape: tuple[int, ...], available: int) -> tuple[torch.dtype, int, int]:
    """Dtype, begin and end of one header entry whose shape must be `shape`. Raises BundleError."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BundleError(f"{where}: the header entry is malformed")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise BundleError(f"{where}: dtype {entry['dtype']!r} is not one of {', '.join(_DTYPES)}")
    if entry["shape"] != list(shape):
        raise BundleError(f"{where}: shape {entry['shape']}, expected {list(shape)}")
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(o) is not int for o in offsets):
        raise BundleError(f"{where}: data_offsets {offsets!r} are malformed")
    begin, end = offsets
    if not 0 <= begin <= end <= available or end - begin != math.prod(shape) * dtype.itemsize:
        raise BundleError(f"{where}: bytes {begin} to {end} do not fit its shape or the file")
    return dtype, begin, end
