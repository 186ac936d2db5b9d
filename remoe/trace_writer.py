"""Writes a trace step by step, in constant memory: each array goes to a file of its own until the number of tokens is
known, then all become one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import numpy as np

from remoe.trace_file import Array, header_bytes
from runtime.errors import EdgeError, UsageError
from runtime.strict import to_dict
from runtime.whole_file import whole_file

if TYPE_CHECKING:
    from remoe.trace import TraceInfo

RECORDED_ON_REQUEST = ("logits", "hidden")
_MAX_FP16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True, eq=False)
class Block:
    """What a few tokens, one after the other, were routed to; arrays as in `Trace`, of any fitting dtype."""

    experts: Array
    weights: Array
    tokens: Array
    requests: Array
    positions: Array
    decode: Array
    logits: Array | None = None
    hidden: Array | None = None

    def arrays(self, num_experts: int) -> dict[str, Array]:
        """In the dtypes and the order of the file, without what was not recorded.

        Raises UsageError for a logit or router input that fp16 cannot hold.
        """
        found = {}
        for name, dtype in array_dtypes(num_experts).items():
            value = getattr(self, name)
            if name in RECORDED_ON_REQUEST:
                if value is not None:
                    found[name] = _half(np.asarray(value), name)
            else:
                found[name] = np.asarray(value, dtype)
        return found


class TraceWriter:
    """Use as a context manager: leaving it writes the file, leaving it with an error writes nothing."""

    def __init__(self, path: str | Path, info: TraceInfo, choice_bias: Array | None = None) -> None:
        """Raises UsageError when nothing can be written beside `path`."""
        self.path, self._info, self._choice_bias = Path(path), info, choice_bias
        self._parts: dict[str, IO[bytes]] = {}
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._count = 0
        if not self.path.parent.is_dir() or not os.access(self.path.parent, os.W_OK):
            raise UsageError(f"{self.path}: {self.path.parent} is no folder that can be written to")
        if self.path.is_dir():
            raise UsageError(f"{self.path}: is a folder: name a file in it")

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for part in self._parts.values():
                with contextlib.suppress(OSError):  # what a full disk left in its buffer: the file has no name
                    part.close()

    def add(self, block: Block) -> None:
        """Append a block. Every block has the same arrays. Raises EdgeError when the disk is full."""
        arrays = block.arrays(self._info.num_experts)
        if self._parts and set(arrays) != set(self._parts):
            raise ValueError(f"a block has {sorted(arrays)}, those before it {sorted(self._parts)}")
        try:
            for name, array in arrays.items():
                if name not in self._parts:
                    self._parts[name] = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115 - closed on exit
                    self._shapes[name] = (str(array.dtype), array.shape[1:])
                self._parts[name].write(np.ascontiguousarray(array).tobytes())
        except OSError as problem:
            raise EdgeError(f"{self.path}: cannot be written: {problem.strerror}") from problem
        self._count += len(arrays["tokens"])

    def _finish(self) -> None:
        if not self._count:
            raise UsageError("nothing was routed: a trace needs at least one token")
        shapes = {name: (dtype, (self._count, *rest)) for name, (dtype, rest) in self._shapes.items()}
        last = b""
        if self._choice_bias is not None:
            bias = np.ascontiguousarray(self._choice_bias, np.float32)
            shapes["choice_bias"], last = ("float32", bias.shape), bias.tobytes()
        texts = {"trace": json.dumps(to_dict(self._info), allow_nan=False, sort_keys=True)}
        with whole_file(self.path) as file:
            file.write(header_bytes(texts, shapes))
            for part in self._parts.values():
                part.seek(0)  # writes what is buffered: a full disk is told by whole_file
                shutil.copyfileobj(part, file, 1 << 20)
            file.write(last)


def array_dtypes(num_experts: int) -> dict[str, str]:
    """Dtypes of a block's arrays in the file, in their order there."""
    return {
        "experts": "uint8" if num_experts <= 256 else "uint16",
        "weights": "float16",
        "tokens": "int32",
        "requests": "int32",
        "positions": "int32",
        "decode": "uint8",
        "logits": "float16",
        "hidden": "float16",
    }


def _half(values: Array, name: str) -> Array:
    """To fp16, refusing what would become infinite."""
    if values.dtype != np.float16 and values.size and not float(np.abs(values).max()) <= _MAX_FP16:
        raise UsageError(f"{name}: a value of {float(np.abs(values).max())} does not fit fp16: leave --{name} out")
    return values.astype(np.float16)
