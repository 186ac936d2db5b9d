"""Files on disk: opened so that nothing outside the bundle can be reached, read past the page cache where possible.

`ExpertStorage` is the seam for faults: tests put a `FaultyStorage` with the same two methods in its place.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import stat
from typing import Protocol

from runtime.errors import BundleError, EdgeError, ReadError

_DIRECT = getattr(os, "O_DIRECT", 0)
_SPARE_FILES = 64  # descriptors left for everything that is not a blob


class Storage(Protocol):
    """What the loader needs of a disk."""

    direct: bool  # reads bypass the page cache, so they start and end on pages

    def read(self, layer: int, expert: int, offset: int, view: memoryview) -> int:
        """One positioned read into `view`; returns the bytes read, which may be fewer. Raises OSError."""
        ...

    def name(self, layer: int, expert: int) -> str:
        """The blob's name for messages."""
        ...


def open_file(directory: int, path: str, size: int, direct: bool = False) -> int:
    """Open `path` below the directory descriptor without following any link, and check it on the descriptor.

    Raises BundleError unless it is a regular file with one link and exactly `size` bytes, and OSError (EINVAL) when
    `direct` is asked for and the file system has no O_DIRECT.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    parents: list[int] = []
    try:
        *folders, leaf = path.split("/")
        for folder in folders:
            parents.append(os.open(folder, flags | os.O_DIRECTORY, dir_fd=parents[-1] if parents else directory))
        descriptor = os.open(leaf, flags | (_DIRECT if direct else 0), dir_fd=parents[-1] if parents else directory)
    except OSError as error:
        raise _explain(path, error) from None
    finally:
        for parent in parents:
            os.close(parent)
    try:
        _check(path, os.fstat(descriptor), size)
    except BundleError:
        os.close(descriptor)
        raise
    return descriptor


def read_file(directory: int, path: str, size: int, direct: bool = True) -> memoryview:
    """The whole file in page-aligned memory, read past the page cache unless `direct` is off or not possible."""
    try:
        descriptor = open_file(directory, path, size, direct)
    except DirectUnsupportedError:
        descriptor = open_file(directory, path, size)
    try:
        pages = max(1, -(-size // mmap.PAGESIZE))
        memory = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # weights are walked through once per token: fewer pages to look up
        view = memoryview(memory)
        done = 0
        while done < size:
            count = os.preadv(descriptor, [view[done : done + (64 << 20)]], done)
            if count <= 0:
                raise ReadError(f"{path}: ended after {done} of {size} bytes: run `edge verify` on the bundle")
            done += count
        return view[:size]
    except OSError as error:
        raise ReadError(f"{path}: {error.strerror}: check the disk (dmesg), then run `edge verify`") from error
    finally:
        os.close(descriptor)


class DirectUnsupportedError(BundleError):
    """The file system cannot open files with O_DIRECT."""


class ExpertStorage:
    """Every expert blob, held open for the life of the engine and never reopened by path."""

    def __init__(self, directory: int, blobs: dict[tuple[int, int], str], blob_bytes: int, direct: bool) -> None:
        _allow_files(len(blobs))
        self._names = blobs
        self.descriptors: dict[tuple[int, int], int] = {}
        self.direct = direct and bool(_DIRECT)
        self.notes: list[str] = []
        try:
            for key, path in blobs.items():
                self.descriptors[key] = self._open(directory, path, blob_bytes)
        except BaseException:
            self.close()
            raise

    def read(self, layer: int, expert: int, offset: int, view: memoryview) -> int:
        """One preadv; without O_DIRECT the pages are dropped from the page cache afterwards."""
        descriptor = self.descriptors[layer, expert]
        count = os.preadv(descriptor, [view], offset)
        if not self.direct:
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def name(self, layer: int, expert: int) -> str:
        return self._names[layer, expert]

    def close(self) -> None:
        """Close every blob; reads in flight must have ended."""
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()

    def _open(self, directory: int, path: str, size: int) -> int:
        if self.direct:
            try:
                return open_file(directory, path, size, direct=True)
            except DirectUnsupportedError:
                self.direct = False
                self.notes.append("reads: buffered, because this file system has no O_DIRECT; the page cache grows")
        return open_file(directory, path, size)


def _allow_files(count: int) -> None:
    """Raise the soft limit on open files where the hard limit allows it."""
    wanted = count + _SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise EdgeError(
                f"the bundle has {count} experts, each an open file, but this process may open only {hard}: "
                f"raise the hard limit (`ulimit -Hn {wanted}` as root, or LimitNOFILE= of the service)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check(path: str, status: os.stat_result, size: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: not a regular file")
    if status.st_nlink != 1:
        raise BundleError(f"{path}: has {status.st_nlink} links, expected 1: copy the bundle instead of linking it")
    if status.st_size != size:
        raise BundleError(
            f"{path}: {status.st_size} bytes on disk, {size} in the manifest: the bundle is damaged; export it again"
        )


def _explain(path: str, error: OSError) -> EdgeError:
    if error.errno == errno.EINVAL:
        return DirectUnsupportedError(f"{path}: this file system has no O_DIRECT")
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return BundleError(f"{path}: is a link or lies behind one, which a bundle must not")
    if error.errno == errno.ENOENT:
        return BundleError(f"{path}: listed in manifest.json but missing: the bundle is damaged; export it again")
    return EdgeError(f"{path}: {error.strerror}")
