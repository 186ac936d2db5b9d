"""The compiled kernel for decoding: fp16 matrix times a few fp32 vectors (gemv.c), built where a C compiler is found.

Without it torch does the same products, slower; the engine says which it is.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
from pathlib import Path

import torch

_SIZES, _POINTERS = ctypes.c_ssize_t, ctypes.c_void_p


class Kernel:
    """The loaded library. Its threads belong to the process; callers take turns."""

    def __init__(self, library: ctypes.CDLL, threads: int, level: int = -1) -> None:
        """`level` picks an instruction set as in gemv.c; -1 is the best. Raises OSError where it is not to be had."""
        library.edge_product.argtypes = [_POINTERS] * 3 + [_SIZES] * 3
        library.edge_product.restype = None
        library.edge_gated_mlp.argtypes = [_POINTERS] * 5 + [_SIZES] * 3
        library.edge_gated_mlp.restype = None
        if library.edge_start(ctypes.c_int(level), ctypes.c_int(threads)) != 0:
            raise OSError(f"the kernel does not start at level {level} with {threads} threads")
        self._product, self._gated = library.edge_product, library.edge_gated_mlp

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """weight [R, C] fp16 times x [n, C] fp32, both contiguous: [n, R] fp32. A row's bits do not depend on n."""
        rows, columns = weight.shape
        y = torch.empty(len(x), rows)
        self._product(weight.data_ptr(), x.data_ptr(), y.data_ptr(), rows, columns, len(x))
        return y

    def gated_mlp(self, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """down (silu(gate x) * up x): gate_up [2I, H], down [H, I] fp16, x [n, H] fp32, to [n, H] fp32."""
        hidden, inner = down.shape
        scratch, y = torch.empty(3 * inner * len(x)), torch.empty(len(x), hidden)
        pointers = (t.data_ptr() for t in (gate_up, down, x, scratch, y))
        self._gated(*pointers, inner, hidden, len(x))
        return y


def library_path() -> Path | None:
    """Where the compiled library lies, or None where it was not built."""
    folder = Path(__file__).parent
    found = (folder / f"_gemv{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in found if path.is_file()), None)


def load(threads: int) -> Kernel | None:
    """The kernel, or None where it was not built or the processor has no suitable instructions."""
    path = library_path()
    if path is None:
        return None
    try:
        return Kernel(ctypes.CDLL(str(path)), threads)
    except OSError:  # built on another kind of machine: torch computes the same
        return None
