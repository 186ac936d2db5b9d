"""Reading with Python's threads: for machines without a compiler, and for storages that are no files.

Chunks are hashed in order as they land, so that only the last one is still to be hashed when the read ends.
"""

from __future__ import annotations

import errno
import queue
import threading
import time
from dataclasses import dataclass, field

import xxhash

from runtime import native
from runtime.layout import PAGE_BYTES, expert_identity
from runtime.reading import CANCELLED, DIFFERS, MAX_STALLS, Load, failed
from runtime.storage import Storage


@dataclass(eq=False)
class _State:
    """How far a load is."""

    load: Load
    hasher: xxhash.xxh3_64
    lock: threading.Lock = field(default_factory=threading.Lock)
    problem: str = ""
    settled: int = 0
    landed: set[int] = field(default_factory=set)
    hashed: int = 0
    hashing: bool = False
    retried: bool = False
    cancelled: bool = False


class ThreadReader:
    """A few daemon threads over one storage."""

    def __init__(
        self,
        storage: Storage,
        checksums: dict[tuple[int, int], int],
        chunks: list[tuple[int, int]],
        threads: int,
    ) -> None:
        self._storage, self._checksums, self._chunks = storage, checksums, chunks
        self._jobs: queue.SimpleQueue[tuple[_State, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._states: dict[Load, _State] = {}  # of the loads on their way
        self._busy_since_ns = 0
        self._busy_ns = 0
        self._retries = 0
        names = (f"expert-reader-{number}" for number in range(threads))
        self._workers = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for worker in self._workers:
            worker.start()

    def start(self, load: Load) -> None:
        """See Reader.start."""
        with self._lock:
            if not self._states:
                self._busy_since_ns = load.submitted_ns
            self._begin(load, retried=False)

    def next(self, done: queue.SimpleQueue[Load], timeout_s: float) -> Load | None:
        """See Reader.next."""
        try:
            return done.get(timeout=timeout_s) if timeout_s else done.get_nowait()
        except queue.Empty:
            return None

    def cancel(self, load: Load) -> None:
        """See Reader.cancel."""
        with self._lock:
            if load in self._states:
                self._states[load].cancelled = True

    def counts(self) -> tuple[int, int]:
        """See Reader.counts."""
        with self._lock:
            running = time.monotonic_ns() - self._busy_since_ns if self._states else 0
            return self._busy_ns + running, self._retries

    def close(self, timeout_s: float) -> bool:
        """See Reader.close. A view keeps a slot's memory where that is Python's own; that of a GPU is freed by hand."""
        until = time.monotonic() + timeout_s
        with self._lock:
            for state in self._states.values():
                state.cancelled = True
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join(max(0.0, until - time.monotonic()))
        return not any(worker.is_alive() for worker in self._workers)

    def _begin(self, load: Load, retried: bool) -> None:
        """The lock is held."""
        state = _State(load, xxhash.xxh3_64(seed=expert_identity(load.layer, load.expert)), retried=retried)
        self._states[load] = state
        for index in range(len(self._chunks)):
            self._jobs.put((state, index))

    def _work(self) -> None:
        native.short_slice()  # a reader has microseconds to do: it need not wait until arithmetic's turn is over
        while (job := self._jobs.get()) is not None:
            state, index = job
            try:
                problem = CANCELLED if state.cancelled else ""
                if not problem:
                    self._read(state.load, *self._chunks[index])
            except OSError as error:
                problem = error.strerror or str(error)
            self._settle(state, index, problem)

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
            if stalls > MAX_STALLS:
                raise OSError(errno.EIO, f"no progress after {done} bytes")
            done += count

    def _settle(self, state: _State, index: int, problem: str) -> None:
        """Take note of one chunk; whoever finds the next chunk in order hashes on; the last one finishes the blob."""
        with state.lock:
            state.settled += 1
            state.problem = state.problem or problem
            if not problem:
                state.landed.add(index)
            if state.hashing:
                return
            state.hashing = True
        while True:
            with state.lock:
                if state.hashed not in state.landed:
                    state.hashing = False
                    last = state.settled == len(self._chunks)
                    break
                begin, end = self._chunks[state.hashed]
                state.hashed += 1
            state.hasher.update(state.load.view[begin:end])
        if last:
            self._finish(state)

    def _finish(self, state: _State) -> None:
        load, problem = state.load, state.problem
        load.bytes = sum(end - begin for begin, end in (self._chunks[index] for index in state.landed))
        if not problem and state.hasher.intdigest() != self._checksums[load.layer, load.expert]:
            problem = DIFFERS
        if problem and not state.retried and not state.cancelled:
            with self._lock:
                self._retries += 1
                self._begin(load, retried=True)
            return
        if problem:
            load.error = failed(self._storage.name(load.layer, load.expert), problem)
        load.finished_ns = time.monotonic_ns()
        with self._lock:
            del self._states[load]
            if not self._states:
                self._busy_ns += load.finished_ns - self._busy_since_ns
        load.end()
