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


@pytest.fixture(params=[False, True], ids=["threads", "compiled"])
def compiled(request: pytest.FixtureRequest) -> bool:
    """Whose threads read: Python's, or the compiled library's."""
    if request.param:
        request.getfixturevalue("library")
    return bool(request.param)
