"""What every test has: one thread for torch, and the compiled kernel by name."""

import ctypes
import os

import pytest

# Before torch is imported: tiny models gain nothing from threads, and lose much where others have the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The built library of runtime/native."""
    from tests.kernels import open_library

    return open_library()
