"""Reads into memory that the disk cannot reach: through a small ordinary buffer, one copy more.

Whether O_DIRECT reads go straight into page-locked GPU memory depends on kernel and driver: it is tried once.
"""

from __future__ import annotations

import errno
import mmap
import threading

from runtime.errors import ReadError
from runtime.layout import PAGE_BYTES
from runtime.storage import Storage

_BUFFER_BYTES = 2 << 20
_UNREACHABLE = (errno.EFAULT, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOMEM)


class BounceStorage:
    """A storage whose reads take the way through a buffer of the reading thread."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._buffers = threading.local()
        self.direct = storage.direct

    def read(self, layer: int, expert: int, offset: int, view: memoryview) -> int:
        """See Storage.read."""
        buffer = self._buffer()[: len(view)]
        count = self._storage.read(layer, expert, offset, buffer)
        if count > 0:
            view[:count] = buffer[:count]
        return count

    def name(self, layer: int, expert: int) -> str:
        """See Storage.name."""
        return self._storage.name(layer, expert)

    def _buffer(self) -> memoryview:
        if not hasattr(self._buffers, "view"):
            self._buffers.view = memoryview(mmap.mmap(-1, _BUFFER_BYTES))
        view: memoryview = self._buffers.view
        return view


def reachable(storage: Storage, expert: tuple[int, int], slot: memoryview) -> tuple[Storage, str]:
    """The storage to read slots like `slot` with, and a note where that is not the plain one.

    Reads the first page of an expert's blob into the slot and into ordinary memory and compares. Raises ReadError when
    the blob cannot be read at all.
    """
    plain = memoryview(mmap.mmap(-1, PAGE_BYTES))
    size = min(PAGE_BYTES, len(slot))
    try:
        expected = storage.read(*expert, 0, plain[:size])
    except OSError as error:
        raise ReadError(f"{storage.name(*expert)}: {error.strerror}: check the disk (dmesg)") from error
    try:
        found = storage.read(*expert, 0, slot[:size])
        problem = "" if slot[:found] == plain[:expected] else "other bytes arrive than are in the file"
    except OSError as error:
        if error.errno not in _UNREACHABLE:
            raise ReadError(f"{storage.name(*expert)}: {error.strerror}: check the disk (dmesg)") from error
        problem = str(error.strerror)
    if not problem:
        return storage, ""
    note = f"reads: through a buffer, because the disk cannot fill the GPU's memory itself ({problem}): one copy more"
    return BounceStorage(storage), note
