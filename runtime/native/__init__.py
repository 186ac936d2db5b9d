"""Compiled kernels, built where a C compiler is found: fp16 matrix times a few fp32 vectors (products.c) and the dense
block of one token (block.c), which is what decoding on a CPU consists of, bf16 to fp16 (convert.c), which is what
exporting does, and reading experts (reader.c), which must not wait for Python.

Without them torch computes and Python reads the same, slower; the engine says which it is.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from collections.abc import Sequence
from pathlib import Path

import torch

_SIZES, _POINTERS = ctypes.c_ssize_t, ctypes.c_void_p


class Block(ctypes.Structure):
    """block_t of block.c: one layer. Whoever fills it keeps the tensors behind the pointers alive."""

    _fields_ = [
        *(
            (name, _POINTERS)
            for name in ("attn_norm", "ffn_norm", "q_norm", "k_norm", "qkv_bias", "o_bias", "qkv", "o")
        ),
        *((n, ctypes.c_int64) for n in ("hidden", "heads", "kv_heads", "head_size", "value_size", "norm_whole")),
        *((name, ctypes.c_float) for name in ("norm_eps", "clip", "scale", "residual_scale")),
    ]


class Step(ctypes.Structure):
    """step_t of block.c: one token's way through a layer."""

    _fields_ = [
        *((name, _POINTERS) for name in ("x", "cos", "sin", "keys", "values")),
        ("position", ctypes.c_int64),
        *((name, _POINTERS) for name in ("scratch", "out", "h")),
    ]


class Mlp(ctypes.Structure):
    """mlp_t of products.c: addresses of the weights of a gated MLP and of its results."""

    _fields_ = [(name, _POINTERS) for name in ("gate_up", "down", "y")]


class Kernel:
    """The loaded library. Its threads belong to the process; callers take turns."""

    def __init__(self, library: ctypes.CDLL, threads: int, level: int = -1) -> None:
        """`level` picks an instruction set as in kernels.h, -1 the best. Raises OSError where it is not to be had."""
        library.edge_product.argtypes = [_POINTERS] * 3 + [_SIZES] * 3
        library.edge_product.restype = None
        library.edge_gated_mlps.argtypes = [_POINTERS, _SIZES, _POINTERS, _POINTERS, *[_SIZES] * 3]
        library.edge_gated_mlps.restype = None
        library.edge_block.argtypes = [ctypes.POINTER(Block), ctypes.POINTER(Step)]
        library.edge_block.restype = None
        library.edge_block_scratch.argtypes = [ctypes.POINTER(Block), ctypes.c_int64]
        library.edge_block_scratch.restype = _SIZES
        if library.edge_start(ctypes.c_int(level), ctypes.c_int(threads)) != 0:
            raise OSError(f"the kernel does not start at level {level} with {threads} threads")
        self._product, self._gated = library.edge_product, library.edge_gated_mlps
        self.block, self.block_scratch = library.edge_block, library.edge_block_scratch

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """weight [R, C] fp16 times x [n, C] fp32, both contiguous: [n, R] fp32. A row's bits do not depend on n."""
        rows, columns = weight.shape
        y = torch.empty(len(x), rows)
        self._product(weight.data_ptr(), x.data_ptr(), y.data_ptr(), rows, columns, len(x))
        return y

    def gated_mlp(self, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """down (silu(gate x) * up x): gate_up [2I, H], down [H, I] fp16, x [n, H] fp32, to [n, H] fp32."""
        return self._gated_mlps(x, [(gate_up.data_ptr(), down.data_ptr())], down.shape[1])[0]

    def experts(self, x: torch.Tensor, values: Sequence[torch.Tensor], inner: int) -> torch.Tensor:
        """Several on x [1, H] at once, `values` of each being gate, up and down: to [len(values), H] fp32."""
        down = 2 * inner * x.shape[1] * 2  # bytes from the start
        return self._gated_mlps(x, [(start := v.data_ptr(), start + down) for v in values], inner)[:, 0]

    def _gated_mlps(self, x: torch.Tensor, weights: Sequence[tuple[int, int]], inner: int) -> torch.Tensor:
        """To [len(weights), n, H]; `weights` are addresses of gate_up and of down."""
        count, (vectors, hidden) = len(weights), x.shape
        scratch, y = torch.empty(3 * inner * vectors * count), torch.empty(count, vectors, hidden)
        start, size = y.data_ptr(), y[0].nbytes
        mlps = (Mlp * count)(*(Mlp(*pair, start + i * size) for i, pair in enumerate(weights)))
        self._gated(mlps, count, x.data_ptr(), scratch.data_ptr(), inner, hidden, vectors)
        return y


def short_slice() -> bool:
    """Ask for the calling thread to be run soon after it wakes, in short turns; its share of the processor stays.

    False where there is no kernel library, or the thread has another scheduling policy than the usual one. Linux before
    6.12 takes the wish and does nothing.
    """
    compiled = library()
    return compiled is not None and compiled.edge_short_slice() == 0


def half_from_bf16(source: torch.Tensor, target: torch.Tensor) -> bool | None:
    """Fill `target` (fp16) from `source` (bf16), both 1-D, contiguous and of one length, rounding to nearest even.

    Whether all results are finite; None, and nothing done, where there is no kernel for it.
    """
    compiled = library()
    if compiled is None:
        return None
    answer = compiled.edge_half_from_bf16(
        _POINTERS(source.data_ptr()), _POINTERS(target.data_ptr()), _SIZES(len(source))
    )
    return None if answer < 0 else bool(answer)


def library_path() -> Path | None:
    """Where the compiled library lies, or None where it was not built."""
    folder = Path(__file__).parent
    found = (folder / f"_kernels{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in found if path.is_file()), None)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it was not built or was built on another kind of machine."""
    path = library_path()
    try:
        return None if path is None else ctypes.CDLL(str(path))
    except OSError:
        return None


def load(threads: int) -> Kernel | None:
    """The decoding kernel, or None where there is no library or the processor has no suitable instructions."""
    compiled = library()
    try:
        return None if compiled is None else Kernel(compiled, threads)
    except OSError:  # torch computes the same
        return None
