"""The compiled kernel for decoding: fp16 matrix times one fp32 vector (gemv.c), built where a C compiler is found.

Without it torch does the same products, slower; the engine says which it is.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from pathlib import Path

import torch

_ROWS, _POINTERS = ctypes.c_ssize_t, ctypes.c_void_p


class Gemv:
    """The loaded library. Its threads belong to the process; callers take turns."""

    def __init__(self, library: ctypes.CDLL, threads: int, level: int = -1) -> None:
        """`level` picks an instruction set as in gemv.c; -1 is the best. Raises OSError where it is not to be had."""
        library.edge_gemv.argtypes = [_POINTERS] * 3 + [_ROWS] * 2
        library.edge_gemv.restype = None
        library.edge_gated_mlp.argtypes = [_POINTERS] * 5 + [_ROWS] * 2
        library.edge_gated_mlp.restype = None
        if library.edge_gemv_start(ctypes.c_int(level), ctypes.c_int(threads)) != 0:
            raise OSError(f"the kernel does not start at level {level} with {threads} threads")
        self._gemv, self._gated = library.edge_gemv, library.edge_gated_mlp

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """weight [R, C] fp16, contiguous, times x [1, C] fp32: [1, R] fp32."""
        rows, columns = weight.shape
        y = torch.empty(1, rows)
        self._gemv(weight.data_ptr(), x.data_ptr(), y.data_ptr(), rows, columns)
        return y

    def gated_mlp(self, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """down (silu(gate x) * up x): gate_up [2I, H], down [H, I] fp16, x [1, H] fp32, to [1, H] fp32."""
        hidden, inner = down.shape
        scratch, y = torch.empty(2 * inner), torch.empty(1, hidden)
        self._gated(gate_up.data_ptr(), down.data_ptr(), x.data_ptr(), scratch.data_ptr(), y.data_ptr(), inner, hidden)
        return y


def library_path() -> Path | None:
    """Where the compiled library lies, or None where it was not built."""
    folder = Path(__file__).parent
    found = (folder / f"_gemv{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in found if path.is_file()), None)


def load(threads: int) -> Gemv | None:
    """The kernel, or None where it was not built or the processor has no suitable instructions."""
    path = library_path()
    if path is None:
        return None
    try:
        return Gemv(ctypes.CDLL(str(path)), threads)
    except OSError:  # built on another kind of machine: torch computes the same
        return None
