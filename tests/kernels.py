"""The compiled kernel for tests: its library, and one of its instruction sets at a time."""

from __future__ import annotations

import ctypes
import shutil

import pytest

from runtime import native
from runtime.native import Kernel

LEVELS = {"portable": 0, "avx2": 1, "avx512": 2, "neon": 3}  # as in runtime/native/kernels.h


def open_library() -> ctypes.CDLL:
    """The built library; skips the test without a C compiler. Where there is one, its absence is an error."""
    path = native.library_path()
    if path is None:
        assert shutil.which("cc") is None, "a compiler is here but the kernel was not built: run `make venv`"
        pytest.skip("no C compiler, so no kernel")
    return ctypes.CDLL(str(path))


def start(library: ctypes.CDLL, level: str, threads: int = 1) -> Kernel:
    """A kernel of one instruction set; skips the test where this processor does not have it."""
    try:
        return Kernel(library, threads, LEVELS[level])
    except OSError:
        pytest.skip(f"this processor has no {level}")
