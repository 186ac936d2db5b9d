"""Files that belong to this user alone: checked on the descriptor before a byte of them is used."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from runtime.errors import UsageError


def check_private(path: Path) -> None:
    """Raises UsageError unless `path` is a directory of this user that nobody else may enter."""
    status = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{path}: not a directory, so nothing is loaded from it: remove it")
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise UsageError(f"{path}: open to others than this user, so nothing is loaded from it: run chmod 700 {path}")


def read_private(path: Path, size: int) -> bytes:
    """A whole file of `size` bytes that is this user's alone.

    Raises UsageError otherwise, FileNotFoundError where there is none.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}, so it is not loaded: remove it") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
        if not own or status.st_nlink != 1 or status.st_size != size:
            raise UsageError(f"{path}: not a whole file of this user alone, so it is not loaded: remove it")
        return file.read()


def write_private(path: Path, data: bytes) -> None:
    """A new file of this user alone, on the disk when this returns; replaces another one."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Force a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
