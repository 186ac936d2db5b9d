"""Small pieces of writing safely: errors that tell what to do, hashes on the way, whole writes, one fsync."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import xxhash
from blake3 import blake3

from export.filesystem import FileSystem
from runtime.errors import EdgeError
from runtime.manifest import FileEntry

T = TypeVar("T")
RESUMES = "the export stopped; no bundle was made. When the cause is mended, run the same command again: it resumes"


class SyncError(EdgeError):
    """The kernel could not bring data to the disk. What was written must not be trusted again."""


class Hashes:
    """BLAKE3 and xxh3-64 of a file that passes by."""

    def __init__(self, seed: int) -> None:
        self._blake3, self._xxh3 = blake3(), xxhash.xxh3_64(seed=seed)

    def update(self, data: memoryview) -> None:
        """The next bytes."""
        self._blake3.update(data)
        self._xxh3.update(data)

    def entry(self, size_bytes: int) -> FileEntry:
        """What the manifest says about the file."""
        return FileEntry(size_bytes, self._blake3.hexdigest(), self._xxh3.hexdigest())


@contextmanager
def disk_errors(path: Path, state: str = RESUMES) -> Iterator[None]:
    """Turns an OSError into an EdgeError that names the path and the state that things are in."""
    try:
        yield
    except OSError as error:
        raise EdgeError(f"{path}: {error.strerror or error}: {state}") from error


def synced(sync: Callable[[T], None], what: T) -> None:
    """Call one of FileSystem's sync verbs. Raises SyncError."""
    try:
        sync(what)
    except OSError as error:
        # The kernel may drop what it failed to write and report success the next time: never ask twice.
        raise SyncError(
            f"fsync failed ({error.strerror}): the disk is failing; what was exported is removed"
        ) from error


def write_whole(fs: FileSystem, descriptor: int, data: memoryview) -> None:
    """Write all of `data`, in as many writes as it takes."""
    while data:
        data = data[fs.write(descriptor, data) :]
