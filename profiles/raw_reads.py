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

Piece = tuple[int, int, int]  # descriptor, offset, bytes


class RawReader:
    """Reads pieces of open files into memory of its own, each thread into its part of it from one end to the other."""

    def __init__(self, files: Sequence[tuple[int, int]], owned: bool = False, memory_bytes: int = 0) -> None:
        """`files`: descriptors and sizes in bytes, of which whole pages are read; `close` closes `owned` ones.

        `memory_bytes`: how much memory is read into, at least a block per thread. A few megabytes stay in the
        processor's cache; experts land in slots that were last used long ago.
        """
        self._files = [(descriptor, size // PAGE_BYTES * PAGE_BYTES) for descriptor, size in files]
        self._owned = owned
        self._longest = min(LARGEST_BLOCK, max(size for _, size in self._files))
        self._memory_bytes = memory_bytes
        self._memory = memoryview(b"")
        self._random = random.Random(0)

    @classmethod
    def open(cls, paths: Sequence[Path], memory_bytes: int = 0) -> RawReader:
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
        buffers = self._parts(threads, min(block or LARGEST_BLOCK, self._longest))
        work = _Work(self._pieces(block, total_bytes), seconds)
        workers = [threading.Thread(target=work.read, args=(buffer,), daemon=True) for buffer in buffers]
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

    def _parts(self, count: int, least_bytes: int) -> list[memoryview]:
        """The memory in `count` equal parts of whole pages."""
        each = max(least_bytes, self._memory_bytes // count // PAGE_BYTES * PAGE_BYTES)
        if len(self._memory) < count * each:
            self._memory = page_aligned(count * each)
        return [self._memory[i * each : (i + 1) * each] for i in range(count)]

    def _pieces(self, block: int | None, total_bytes: int | None) -> Iterator[Piece]:
        """Every piece once in random order, then all of them again, until `total_bytes` are reached."""
        order = [(fd, offset, step) for fd, size in self._files for offset, step in _cut(size, block)]
        self._random.shuffle(order)  # before the clock runs
        return _until(itertools.cycle(order), total_bytes)


class _Work:
    """What the threads of one measurement share."""

    def __init__(self, pieces: Iterator[Piece], seconds: float) -> None:
        self._pieces, self._lock = pieces, threading.Lock()
        self.failure: OSError | None = None
        self.done_bytes = 0
        self.begin = time.perf_counter()
        self.end = self.begin + seconds

    def read(self, buffer: memoryview) -> None:
        """Until nothing is left, the time is over (but once at least) or a read failed."""
        target = 0
        while not self.failure:
            with self._lock:
                piece = next(self._pieces, None)
            if piece is None:
                return
            descriptor, offset, size = piece
            target = target if target + size <= len(buffer) else 0
            try:
                if os.preadv(descriptor, [buffer[target : target + size]], offset) != size:
                    raise OSError(0, "a read came back short")
            except OSError as error:
                self.failure = error
                return
            target += size
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
