"""Writes a safetensors file tensor by tensor, so that a checkpoint larger than memory can be made."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from types import TracebackType

import numpy as np

from runtime.errors import UsageError

ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4}


class SafetensorsStream:
    """One file whose tensors are known beforehand and written in that order; a context manager.

    `plan` maps names to shapes, all of `dtype` ("F16", "BF16", "F32"). `sha256` is that of the bytes written so far.
    """

    def __init__(self, path: Path, plan: dict[str, tuple[int, ...]], dtype: str, hashed: bool = True) -> None:
        self._left = [(name, math.prod(shape) * ITEM_BYTES[dtype]) for name, shape in reversed(plan.items())]
        header = safetensors_header(plan, dtype)
        self.total_bytes = len(header) + sum(size for _, size in self._left)
        self._digest = hashlib.sha256() if hashed else None
        self._file = path.open("wb")
        self._put(header)

    @property
    def sha256(self) -> str | None:
        """Hex SHA-256 so far, None when not asked for."""
        return self._digest.hexdigest() if self._digest else None

    def write(self, name: str, values: np.ndarray) -> None:
        """The next tensor of the plan; its bytes must be exactly those planned (bf16 as uint16). OSError when full."""
        expected, size = self._left.pop()
        if (name, values.nbytes) != (expected, size):
            raise UsageError(f"{name}: {values.nbytes} bytes where {expected} of {size} bytes was planned")
        self._put(np.ascontiguousarray(values).data.cast("B"))

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._left:
            raise UsageError(f"{self._left[-1][0]}: planned but not written, {len(self._left)} tensors in all")

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        if self._digest:
            self._digest.update(data)


def safetensors_header(plan: dict[str, tuple[int, ...]], dtype: str) -> bytes:
    """Length and JSON, padded with spaces to 8 bytes."""
    entries, offset = {}, 0
    for name, shape in plan.items():
        end = offset + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
