"""Every file operation of the exporter, in one place: tests hand in one that fails when they want it to."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class FileSystem:
    """The operating system's file operations; all raise OSError."""

    def make_directory(self, path: Path) -> None:
        """Create a directory and its missing parents; an existing one is fine."""
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path) -> int:
        """Open a new file for writing past the page cache, where the file system can."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Older tmpfs and some network file systems know no O_DIRECT; some create the file before they say so.
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return os.open(path, flags, 0o644)

    def append(self, path: Path) -> int:
        """Open a file to append to, created when missing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of `data`; the count of bytes that were."""
        return os.write(descriptor, data)

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut (or extend) a file to `size` bytes."""
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        """Force a file or directory to the disk."""
        os.fsync(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Force a directory's entries to the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Move within one file system, replacing a file."""
        os.rename(source, target)

    def exchange(self, one: Path, other: Path) -> None:
        """Swap two names atomically (renameat2)."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(one))

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def remove_tree(self, path: Path) -> None:
        """Remove a directory with all that is in it."""
        shutil.rmtree(path)

    def free_bytes(self, path: Path) -> int:
        """Bytes that an ordinary user may still write there."""
        state = os.statvfs(path)
        return state.f_bavail * state.f_frsize

    def try_lock(self, descriptor: int) -> bool:
        """Take the lock of an open file until it is closed; False when another process has it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
