"""The loader: reads blobs straight into slots and checks them before anybody sees them.

A blob is cut into chunks so that several threads read it at once. A blob that fails to read or to match its checksum
is read once more, and then reported. Threads of the compiled library read where there is one, Python's where not.
"""

from __future__ import annotations

import queue
import time

from runtime.errors import ReadError
from runtime.native.reader import CompiledReader
from runtime.reading import Load, Reader, cut
from runtime.storage import ExpertStorage, Storage
from runtime.thread_reader import ThreadReader

_CLOSE_S = 2.0  # a read that still hangs then keeps its memory


class Loader:
    """A few reader threads over one storage."""

    def __init__(
        self,
        storage: Storage,
        checksums: dict[tuple[int, int], int],
        blob_bytes: int,
        threads: int,
        deadline_s: float = 60.0,
        compiled: bool | None = None,
    ) -> None:
        """`compiled`: whose threads read; None: the compiled library's where there is one and blobs are plain files.

        Raises OSError when `compiled` threads are asked for and cannot be had.
        """
        self._reader = _reader(storage, checksums, cut(blob_bytes, threads), threads, compiled)
        self._deadline_s = deadline_s
        self.dead: str | None = None

    def submit(self, layer: int, expert: int, view: memoryview, done: queue.SimpleQueue[Load]) -> Load:
        """Start reading one blob into `view`. Raises ReadError when the storage has stopped answering."""
        if self.dead:
            raise ReadError(self.dead)
        load = Load(layer, expert, view, done, time.monotonic_ns())
        self._reader.start(load)
        return load

    def cancel(self, load: Load) -> None:
        """What has not been read of it need not be: it ends soon, well or with an error."""
        self._reader.cancel(load)

    def ended(self, done: queue.SimpleQueue[Load]) -> Load | None:
        """The next load that has ended already, None when there is none."""
        return self._reader.next(done, 0.0)

    def wait(self, done: queue.SimpleQueue[Load]) -> Load:
        """The next load that has ended, well or not. Raises ReadError when none ends before the deadline."""
        load = self._reader.next(done, self._deadline_s)
        if load is None:
            self.dead = (
                f"the disk did not answer for {self._deadline_s:.0f} s: this engine is of no use any more; "
                "check the disk (dmesg), then open the bundle again"
            )
            raise ReadError(self.dead)
        return load

    def busy_ns(self) -> int:
        """Time so far in which at least one blob was on its way."""
        return self._reader.counts()[0]

    @property
    def reader(self) -> str:
        """Whose threads read: "compiled" or "python", for records."""
        return "compiled" if isinstance(self._reader, CompiledReader) else "python"

    @property
    def retries(self) -> int:
        """Blobs that were read twice."""
        return self._reader.counts()[1]

    def close(self) -> None:
        """End the threads; a read that hangs in the kernel is not waited for, and `dead` says so."""
        if not self._reader.close(0.0 if self.dead else _CLOSE_S):
            self.dead = self.dead or "the disk did not answer when the engine was closed"


def _reader(
    storage: Storage,
    checksums: dict[tuple[int, int], int],
    chunks: list[tuple[int, int]],
    threads: int,
    compiled: bool | None,
) -> Reader:
    if compiled or (compiled is None and isinstance(storage, ExpertStorage)):
        try:
            return CompiledReader(storage, checksums, chunks, threads)
        except OSError:
            if compiled:
                raise
    return ThreadReader(storage, checksums, chunks, threads)
