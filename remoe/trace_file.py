"""A trace's safetensors file, read without trusting it: header, then arrays that start and end where it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import BundleError, UsageError
from runtime.strict import parse_json

DTYPES = {"U8": "uint8", "U16": "uint16", "I32": "int32", "F16": "float16", "F32": "float32"}
_CODES = {name: code for code, name in DTYPES.items()}
_MAX_HEADER_BYTES = 1 << 20
_IN_MEMORY_BYTES = 1 << 30  # larger arrays stay on disk and are read where they are looked at

Array = np.ndarray[Any, np.dtype[Any]]


def open_arrays(path: Path) -> tuple[dict[str, str], dict[str, Array]]:
    """The texts of `__metadata__` and the arrays by name. Raises UsageError for anything that is not such a file."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise UsageError(f"{path}: not a trace (a safetensors file begins with the size of its header)")
            header = parse_json(file.read(length), str(path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; `edge trace BUNDLE --out {path}` records one") from None
    except BundleError as error:
        raise UsageError(f"{error}: not a trace") from None
    if not isinstance(header, dict):
        raise UsageError(f"{path}: the header is no object: not a trace")
    texts = header.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise UsageError(f"{path}: __metadata__ does not hold texts: not a trace")
    return texts, _arrays(path, header, 8 + length, size)


def header_bytes(texts: dict[str, str], shapes: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The beginning of a file whose arrays follow in the order of `shapes` (name to dtype and shape)."""
    entries: dict[str, Any] = {"__metadata__": texts}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, allow_nan=False, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // 64) * 64 - 8)  # arrays then start on a cache line
    return len(text).to_bytes(8, "little") + text


def _arrays(path: Path, header: dict[str, Any], start: int, size: int) -> dict[str, Array]:
    found: dict[str, Array] = {}
    end = 0
    for name, entry in header.items():
        _check_entry(entry, f"{path}: {name}")
    for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        begin, stop = entry["data_offsets"]
        dtype = np.dtype(DTYPES[entry["dtype"]])
        count = math.prod(entry["shape"])
        if begin != end or stop - begin != count * dtype.itemsize:
            raise UsageError(f"{path}: {name}: bytes {begin} to {stop} do not fit its shape or the tensor before it")
        end = stop
        if start + end > size:
            raise UsageError(
                f"{path}: cut off: {name} ends at byte {start + end}, the file at {size}: record it again with "
                "`edge trace BUNDLE`"
            )
        shape = tuple(entry["shape"])
        if count and count * dtype.itemsize > _IN_MEMORY_BYTES:
            found[name] = np.memmap(path, dtype, "r", start + begin, shape)
        else:
            found[name] = np.fromfile(path, dtype, count, offset=start + begin).reshape(shape)
    if start + end != size:
        raise UsageError(f"{path}: {size - start - end} bytes follow the last tensor: not a trace, or a damaged one")
    return found


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UsageError(f"{where}: the header entry is malformed")
    if entry["dtype"] not in DTYPES:
        raise UsageError(f"{where}: dtype {entry['dtype']!r} is not one of {', '.join(DTYPES)}")
    for field, length in (("shape", None), ("data_offsets", 2)):
        value = entry[field]
        whole = isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
        if not whole or (length is not None and len(value) != length):
            raise UsageError(f"{where}: {field} {value!r:.80} is malformed")
