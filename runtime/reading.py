"""What reading a blob is, whoever does it: a load, its chunks, and what a reader promises."""

from __future__ import annotations

import itertools
import queue
import threading
from dataclasses import dataclass, field
from typing import Protocol

from runtime.errors import ReadError
from runtime.layout import PAGE_BYTES

CHUNK_BYTES = 2 << 20  # on average at most
_LEAST_CHUNK_BYTES = 256 << 10
MAX_STALLS = 8  # reads in a row without progress before a blob counts as unreadable
DIFFERS = "its checksum does not match the manifest"
CANCELLED = "it is not wanted any more"


@dataclass(eq=False)
class Load:
    """One blob on its way into a slot. `done` receives it when it has ended: landed, cancelled, or failed for good."""

    layer: int
    expert: int
    view: memoryview
    done: queue.SimpleQueue[Load]
    submitted_ns: int
    started_ns: int = 0
    finished_ns: int = 0
    bytes: int = 0  # read, in chunks that came well
    error: ReadError | None = None
    ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def end(self) -> None:
        """By a thread of the reader: everything above is said."""
        with self._lock:
            self.ended = True
            self.done.put(self)

    def redirect(self, done: queue.SimpleQueue[Load]) -> None:
        """Another queue receives it; one that has ended already is then in both."""
        with self._lock:
            self.done = done
            if self.ended:
                done.put(self)


class Reader(Protocol):
    """Threads that read loads in chunks, check them and, where something is wrong, read them once more."""

    def start(self, load: Load) -> None:
        """Read the load into its view; its `done` gets it when it has ended, well or with an error."""
        ...

    def next(self, done: queue.SimpleQueue[Load], timeout_s: float) -> Load | None:
        """Take the next load out of `done`, or None when none has ended before the time is over."""
        ...

    def cancel(self, load: Load) -> None:
        """What has not been read of it need not be: it ends soon, well or with an error."""
        ...

    def counts(self) -> tuple[int, int]:
        """Time so far in which at least one load was on its way, ns; how many blobs were read twice."""
        ...

    def close(self, timeout_s: float) -> bool:
        """End the threads, waiting at most `timeout_s` for reads; whether no slot can be written to any more."""
        ...


def failed(name: str, problem: str) -> ReadError:
    """The error of a blob that could not be read."""
    return ReadError(f"{name}: {problem} (read twice): run `edge verify` on the bundle")


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
