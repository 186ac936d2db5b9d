"""The disk under a folder: free space, O_DIRECT, and its read speed, measured the way experts are read."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edge.checks import Check
from edge.console import format_bytes
from profiles.raw_reads import RawReader
from runtime.errors import EdgeError

BLOCKS_BYTES = (1 << 20, 4 << 20, 16 << 20)
_FILE_BYTES = 512 << 20
_WRITE_S = 5.0  # a slow card gets a smaller file instead of a long wait
_READ_S = 1.0
_THREADS = 4
_DIRECT = getattr(os, "O_DIRECT", 0)
_SLOW_BYTES_PER_S = 1e9
_FEW_FREE_BYTES = 20 << 30


def disk_checks(folder: Path, file_bytes: int = _FILE_BYTES, seconds: float = _READ_S) -> list[Check]:
    """Free space, O_DIRECT and read speed of the disk that holds `folder`."""
    try:
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    except OSError as error:
        return [Check("disk", "FAIL", f"{folder}: {error.strerror}", "name an existing folder: edge doctor FOLDER")]
    rows = [free_check(folder, free)]
    if free < 2 * file_bytes:
        return [
            *rows,
            Check("read speed", "SKIP", f"the measurement needs {format_bytes(2 * file_bytes)} of free space"),
        ]
    try:
        with scratch_file(folder) as descriptor:
            size = fill(descriptor, file_bytes)
            with reader(descriptor) as (source, direct):
                raw = RawReader([(source, size)])
                rates = {block: raw.rate(block, _THREADS, seconds=seconds) for block in BLOCKS_BYTES}
    except OSError as error:
        problem = f"{folder}: cannot write there ({error.strerror})"
        return [*rows, Check("read speed", "WARN", problem, "name a folder you may write to: edge doctor FOLDER")]
    except EdgeError as error:
        return [*rows, Check("read speed", "FAIL", f"{folder}: {error}", "dmesg names the drive and what it said")]
    return [*rows, direct_check(direct), speed_check(rates)]


def free_check(folder: Path, free_bytes: int) -> Check:
    """Room for a bundle."""
    found = f"{format_bytes(free_bytes)} free in {folder.resolve()}"
    if free_bytes < _FEW_FREE_BYTES:
        return Check("disk", "WARN", found, "bundles of published models take 13 to 60 GB")
    return Check("disk", "PASS", found)


def direct_check(works: bool) -> Check:
    """Whether reads can bypass the page cache."""
    if works:
        return Check("O_DIRECT", "PASS", "reads bypass the page cache")
    return Check("O_DIRECT", "WARN", "this file system has none: memory fills with page cache", "use ext4 or xfs")


def speed_check(rates: dict[int, float]) -> Check:
    """Read rates, bytes per second, by block size."""
    found = ", ".join(f"{rate / 1e9:.2f} GB/s at {format_bytes(block)}" for block, rate in rates.items())
    if max(rates.values()) < _SLOW_BYTES_PER_S:
        return Check("read speed", "WARN", found, "experts are read for every token: put the bundle on an NVMe drive")
    return Check("read speed", "PASS", found)


@contextmanager
def scratch_file(folder: Path) -> Iterator[int]:
    """A file without a name in `folder`: the kernel removes it however this process ends."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:  # not every file system can
        descriptor, name = tempfile.mkstemp(prefix=".edge-doctor-", dir=folder)
        os.unlink(name)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def fill(descriptor: int, size: int) -> int:
    """Write up to `size` bytes that cannot be compressed, for at most a few seconds; returns the bytes written."""
    numbers, end, written = np.random.default_rng(0), time.monotonic() + _WRITE_S, 0
    block = max(BLOCKS_BYTES)
    while written < size and (time.monotonic() < end or written < block):
        written += os.write(descriptor, numbers.bytes(block))
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # what was just written must not be read from memory
    return written // block * block


@contextmanager
def reader(descriptor: int) -> Iterator[tuple[int, bool]]:
    """A second descriptor of an open file, for reading, and whether its reads bypass the page cache."""
    source, direct = _open_again(descriptor, _DIRECT), True
    if source is None:
        source, direct = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY), False
    try:
        yield source, direct
    finally:
        os.close(source)


def _open_again(descriptor: int, flags: int) -> int | None:
    """None where the file system cannot be read that way."""
    try:
        source = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | flags)
    except OSError:
        return None
    try:
        os.preadv(source, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
    except OSError:  # some file systems open with O_DIRECT and refuse the read
        os.close(source)
        return None
    return source
