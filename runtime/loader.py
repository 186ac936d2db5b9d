"""The loader: daemon threads that read blobs in chunks straight into slots and check them before anybody sees them.

A blob is cut into chunks so that several threads read it at once; chunks are hashed in order as they land, so that
only the last one is still to be hashed when the read ends. A blob that fails to read or to match its checksum is
read once more, and then reported.
"""

from __future__ import annotations

import errno
import itertools
import queue
import threading
import time
from dataclasses import dataclass, field

import xxhash

from runtime import native
from runtime.errors import ReadError
from runtime.layout import PAGE_BYTES, expert_identity
from runtime.storage import Storage

CHUNK_BYTES = 2 << 20  # on average at most
_LEAST_CHUNK_BYTES = 256 << 10
_MAX_STALLS = 8  # reads in a row without progress before a blob counts as unreadable


@dataclass(eq=False)
class Load:
    """One blob on its way into a slot. `done` receives it when it has landed or failed for good."""

    layer: int
    expert: int
    view: memoryview
    done: queue.SimpleQueue[Load]
    chunks: list[tuple[int, int]]
    submitted_ns: int
    started_ns: int = 0
    finished_ns: int = 0
    retried: bool = False
    error: ReadError | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _problem: str = ""
    _settled: int = 0
    _landed: set[int] = field(default_factory=set)
    _hashed: int = 0
    _hashing: bool = False
    _hasher: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)

    def reset(self) -> None:
        """Forget what has landed, before the second reading."""
        self._problem, self._settled, self._hashed, self._landed = "", 0, 0, set()
        self._hasher = xxhash.xxh3_64(seed=expert_identity(self.layer, self.expert))


class Loader:
    """A few reader threads over one storage."""

    def __init__(
        self,
        storage: Storage,
        checksums: dict[tuple[int, int], int],
        blob_bytes: int,
        threads: int,
        deadline_s: float = 60.0,
    ) -> None:
        self._storage = storage
        self._checksums = checksums
        self._chunks = cut(blob_bytes, threads)
        self._jobs: queue.SimpleQueue[tuple[Load, int] | None] = queue.SimpleQueue()
        self._deadline_s = deadline_s
        self._threads = threads
        self._lock = threading.Lock()
        self._in_flight = 0
        self._busy_since_ns = 0
        self._busy_ns = 0
        self.retries = 0
        self.dead: str | None = None
        for number in range(threads):
            threading.Thread(target=self._work, name=f"expert-reader-{number}", daemon=True).start()

    def submit(self, layer: int, expert: int, view: memoryview, done: queue.SimpleQueue[Load]) -> None:
        """Start reading one blob into `view`. Raises ReadError when the storage has stopped answering."""
        if self.dead:
            raise ReadError(self.dead)
        load = Load(layer, expert, view, done, self._chunks, time.monotonic_ns())
        load.reset()
        with self._lock:
            if self._in_flight == 0:
                self._busy_since_ns = load.submitted_ns
            self._in_flight += 1
        for index in range(len(self._chunks)):
            self._jobs.put((load, index))

    def wait(self, done: queue.SimpleQueue[Load]) -> Load:
        """The next load that has ended, well or not. Raises ReadError when none ends before the deadline."""
        try:
            return done.get(timeout=self._deadline_s)
        except queue.Empty:
            self.dead = (
                f"the disk did not answer for {self._deadline_s:.0f} s: this engine is of no use any more; "
                "check the disk (dmesg), then open the bundle again"
            )
            raise ReadError(self.dead) from None

    def busy_ns(self) -> int:
        """Time so far in which at least one blob was on its way."""
        with self._lock:
            running = time.monotonic_ns() - self._busy_since_ns if self._in_flight else 0
            return self._busy_ns + running

    def close(self) -> None:
        """Tell the threads to end; a read that hangs in the kernel is not waited for."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def _work(self) -> None:
        native.short_slice()  # a reader has microseconds to do: it need not wait until arithmetic's turn is over
        while (job := self._jobs.get()) is not None:
            load, index = job
            try:
                self._read(load, *load.chunks[index])
                problem = ""
            except OSError as error:
                problem = error.strerror or str(error)
            self._settle(load, index, problem)

    def _read(self, load: Load, begin: int, end: int) -> None:
        """Read bytes begin to end of the blob, going on after short reads."""
        if not load.started_ns:
            load.started_ns = time.monotonic_ns()
        done, stalls = begin, 0
        while done < end:
            count = self._storage.read(load.layer, load.expert, done, load.view[done:end])
            if count <= 0:
                raise OSError(errno.EIO, f"the file ends after {done} bytes")
            if self._storage.direct and done + count < end:
                count -= count % PAGE_BYTES  # O_DIRECT can only go on from a page boundary
            stalls = 0 if count else stalls + 1
            if stalls > _MAX_STALLS:
                raise OSError(errno.EIO, f"no progress after {done} bytes")
            done += count

    def _settle(self, load: Load, index: int, problem: str) -> None:
        """Take note of one chunk; whoever finds the next chunk in order hashes on; the last one finishes the blob."""
        with load._lock:
            load._settled += 1
            load._problem = load._problem or problem
            if not problem:
                load._landed.add(index)
            if load._hashing:
                return
            load._hashing = True
        while True:
            with load._lock:
                if load._hashed not in load._landed:
                    load._hashing = False
                    last = load._settled == len(load.chunks)
                    break
                begin, end = load.chunks[load._hashed]
                load._hashed += 1
            load._hasher.update(load.view[begin:end])
        if last:
            self._finish(load)

    def _finish(self, load: Load) -> None:
        problem = load._problem
        if not problem and load._hasher.intdigest() != self._checksums[load.layer, load.expert]:
            problem = "its checksum does not match the manifest"
        if problem and not load.retried:
            load.retried = True
            load.reset()
            with self._lock:
                self.retries += 1
            for index in range(len(load.chunks)):
                self._jobs.put((load, index))
            return
        if problem:
            name = self._storage.name(load.layer, load.expert)
            load.error = ReadError(f"{name}: {problem} (read twice): run `edge verify --full` on the bundle")
        load.finished_ns = time.monotonic_ns()
        with self._lock:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._busy_ns += load.finished_ns - self._busy_since_ns
        load.done.put(load)


def cut(blob_bytes: int, threads: int) -> list[tuple[int, int]]:
    """Chunks of whole pages, about CHUNK_BYTES, as many for every thread: a lone miss keeps them all busy.

    The last round's chunks are a third of the others: they land together, and what has landed together is hashed one
    after the other while nothing is read any more.
    """
    count = threads * -(-blob_bytes // (threads * CHUNK_BYTES))
    count = min(count, -(-blob_bytes // _LEAST_CHUNK_BYTES))
    weights = [3] * max(count - threads, 0) + [1] * min(count, threads)
    pages, whole = -(-blob_bytes // PAGE_BYTES), sum(weights)
    edges = [PAGE_BYTES * (pages * done // whole) for done in itertools.accumulate(weights, initial=0)]
    return list(itertools.pairwise([*edges[:-1], blob_bytes]))
