"""How fast a disk reads, measured the way experts are read: aligned blocks in random order, several at once.

`edge doctor`, `edge calibrate` and the benchmarks all measure with this. Nothing is hashed and nothing is kept.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from runtime.errors import EdgeError, UsageError
from runtime.layout import PAGE_BYTES

LARGEST_BLOCK = 64 << 20  # what "a whole file" is cut into
# What is read into. A few megabytes would stay in the processor's cache and look faster than slots, which were last
# touched long ago; where the slots are less than this, that much is right.
MEMORY_BYTES = 256 << 20

Piece = tuple[int, int, int]  # descriptor, offset, bytes


class RawReader:
    """Reads pieces of open files into memory of its own, from one end of it to the other, over and over."""

    def __init__(self, files: Sequence[tuple[int, int]], owned: bool = False, memory_bytes: int = MEMORY_BYTES) -> None:
        """`files`: descriptors and sizes in bytes, of which whole pages are read; `close` closes `owned` ones.

        `memory_bytes`: how much memory is read into; at least a block per thread.
        """
        self._files = [(descriptor, size // PAGE_BYTES * PAGE_BYTES) for descriptor, size in files]
        self._owned = owned
        self._longest = min(LARGEST_BLOCK, max(size for _, size in self._files))
        self._memory_bytes = memory_bytes
        self._ring = _Ring(memoryview(b""))
        self._random = random.Random(0)

    @classmethod
    def open(cls, paths: Sequence[Path], memory_bytes: int = MEMORY_BYTES) -> RawReader:
        """With O_DIRECT. Raises UsageError for no files at all, or one that cannot be opened so."""
        if not paths:
            raise UsageError("no files to read: give a bundle, or files of some megabytes")
        files: list[tuple[int, int]] = []
        try:
            for path in paths:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
                files.append((descriptor, os.fstat(descriptor).st_size))
        except OSError as error:
            for descriptor, _ in files:
                os.close(descriptor)
            raise UsageError(f"{error.filename}: cannot be read with O_DIRECT ({error.strerror})") from None
        return cls(files, owned=True, memory_bytes=memory_bytes)

    def close(self) -> None:
        """Close the files that are owned."""
        for descriptor, _ in self._files if self._owned else ():
            os.close(descriptor)
        self._files = []

    def rate(self, block: int | None, threads: int, total_bytes: int | None = None, seconds: float = 60.0) -> float:
        """Bytes per second of blocks (None: whole files) until `total_bytes` are asked for or `seconds` are over.

        Raises EdgeError when a read fails.
        """
        self._allocate(threads * min(block or LARGEST_BLOCK, self._longest))
        work = _Work(self._pieces(block, total_bytes), self._ring, seconds)
        workers = [threading.Thread(target=work.read, daemon=True) for _ in range(threads)]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        except BaseException:  # after Ctrl-C, too, no descriptor may be closed under a reader
            work.end = 0.0
            for worker in workers:
                worker.join()
            raise
        elapsed = time.perf_counter() - work.begin
        if work.failure:
            raise EdgeError(f"reading failed: {work.failure.strerror}")
        return work.done_bytes / elapsed

    def _allocate(self, least_bytes: int) -> None:
        """Before the clock runs."""
        size = max(least_bytes, self._memory_bytes // PAGE_BYTES * PAGE_BYTES)
        if len(self._ring.memory) < size:
            self._ring = _Ring(page_aligned(size))

    def _pieces(self, block: int | None, total_bytes: int | None) -> Iterator[Piece]:
        """Every piece once in random order, then all of them again, until `total_bytes` are reached."""
        order = [(fd, offset, step) for fd, size in self._files for offset, step in _cut(size, block)]
        self._random.shuffle(order)  # before the clock runs
        return _until(itertools.cycle(order), total_bytes)


class _Ring:
    """Memory that is given out piece by piece, and then again from its beginning."""

    def __init__(self, memory: memoryview) -> None:
        self.memory, self._at = memory, 0

    def take(self, size: int) -> memoryview:
        """The next `size` bytes in one piece."""
        begin = self._at if self._at + size <= len(self.memory) else 0
        self._at = begin + size
        return self.memory[begin : self._at]


class _Work:
    """What the threads of one measurement share."""

    def __init__(self, pieces: Iterator[Piece], ring: _Ring, seconds: float) -> None:
        self._pieces, self._ring, self._lock = pieces, ring, threading.Lock()
        self.failure: OSError | None = None
        self.done_bytes = 0
        self.begin = time.perf_counter()
        self.end = self.begin + seconds

    def read(self) -> None:
        """Until nothing is left, the time is over (but once at least) or a read failed."""
        while not self.failure:
            with self._lock:
                piece = next(self._pieces, None)
                if piece is None:
                    return
                descriptor, offset, size = piece
                target = self._ring.take(size)
            try:
                if os.preadv(descriptor, [target], offset) != size:
                    raise OSError(0, "a read came back short")
            except OSError as error:
                self.failure = error
                return
            with self._lock:
                self.done_bytes += size
            if time.perf_counter() >= self.end:
                return


def _until(pieces: Iterator[Piece], total_bytes: int | None) -> Iterator[Piece]:
    asked = 0
    for piece in pieces:
        if total_bytes is not None and asked >= total_bytes:
            return
        asked += piece[2]
        yield piece


def page_aligned(size_bytes: int) -> memoryview:
    """Private memory on huge pages where the kernel gives them, every page touched: a target for O_DIRECT."""
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    for offset in range(0, size_bytes, mmap.PAGESIZE):
        memory[offset] = 1
    return memoryview(memory)


def _cut(size: int, block: int | None) -> list[tuple[int, int]]:
    step = min(block or size, size, LARGEST_BLOCK)
    return [(offset, min(step, size - offset)) for offset in range(0, size, step)]
