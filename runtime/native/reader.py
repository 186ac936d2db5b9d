"""Reading with threads of the compiled library (reader.c), which never wait for Python.

They read descriptors; a storage of another kind is called back from them, which is for tests.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import queue
import threading
import time
import weakref

import numpy as np

from runtime import native
from runtime.errors import ReadError
from runtime.layout import expert_identity
from runtime.reading import CANCELLED, DIFFERS, Load, failed
from runtime.storage import ExpertStorage, Storage

_BLOCK_BYTES = 1024  # of XXH3; the checksum in reader.c is for whole ones
_WAIT_NS = 200_000_000  # in C at a time: Ctrl-C is seen between two
_READ = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
_ERROR, _ENDED, _STALLED, _DIFFERS, _CANCELLED = 1, 2, 3, 4, 5
_NOTHING = -1  # no load's number
_CLOSED = "the engine was closed: open the bundle again"
_UNCLOSED_S = 5.0  # for reads that end when nobody has closed the reader
_kept: list[object] = []  # what a read that hangs may still write to: never freed


class _Setup(ctypes.Structure):
    """reader_setup_t of reader.h."""

    _fields_ = [
        ("blob_bytes", ctypes.c_int64),
        ("edges", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in ("chunks", "threads", "direct")),
        ("read", _READ),
    ]


class _Result(ctypes.Structure):
    """reader_result_t of reader.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("id", "submitted_ns", "started_ns", "finished_ns", "problem", "error", "offset", "bytes")
    ]


class CompiledReader:
    """Threads of reader.c over one storage. One thread of Python's at a time may wait for them."""

    def __init__(
        self,
        storage: Storage,
        checksums: dict[tuple[int, int], int],
        chunks: list[tuple[int, int]],
        threads: int,
    ) -> None:
        """Raises OSError where there is no compiled library, no memory or no thread, or blobs are no whole blocks."""
        blob_bytes = chunks[-1][1]
        library = native.library()
        if library is None or blob_bytes % _BLOCK_BYTES:
            raise OSError(f"no compiled reader for blobs of {blob_bytes} bytes")
        self._library, self._storage, self._checksums = _declare(library), storage, checksums
        self._files, callback = _files(storage, checksums)
        edges = (ctypes.c_int64 * (len(chunks) + 1))(*(begin for begin, _ in chunks), blob_bytes)
        setup = _Setup(blob_bytes, edges, len(chunks), threads, storage.direct, callback)
        handle = library.edge_reader_start(ctypes.byref(setup))
        if not handle:
            raise OSError("the compiled reader does not start")
        self._reader = ctypes.c_void_p(handle)
        self._loads: dict[int, Load] = {}  # those on their way: their slots stay while they are written to
        self._ids = itertools.count()
        self._closing = False
        self._turn = threading.RLock()  # nobody may be inside the library when `close` frees the reader
        self._result = _Result(_NOTHING)  # not handed over yet
        self._counts = (ctypes.c_int64 * 2)()
        self._memory: list[object] = [self._loads, callback]
        self._unclosed = weakref.finalize(self, _stop, library, self._reader, self._memory, _UNCLOSED_S)

    def start(self, load: Load) -> None:
        """See Reader.start. Raises ReadError after `close` and without memory."""
        key, number = (load.layer, load.expert), next(self._ids)
        target = ctypes.addressof(ctypes.c_char.from_buffer(load.view))
        seed, checksum = expert_identity(*key), self._checksums[key]
        with self._turn:
            if self._closing:
                raise ReadError(f"{self._storage.name(*key)}: {_CLOSED}")
            self._loads[number] = load
            if self._library.edge_reader_submit(self._reader, number, self._files[key], seed, checksum, target):
                del self._loads[number]
                raise ReadError(f"{self._storage.name(*key)}: no memory is left to read it: close other programs")

    def next(self, done: queue.SimpleQueue[Load], timeout_s: float) -> Load | None:
        """See Reader.next."""
        left = int(timeout_s * 1e9)
        until = time.monotonic_ns() + left
        while done.empty():
            with self._turn:
                if left < 0 or self._closing:
                    return None
                if self._result.id == _NOTHING:
                    self._library.edge_reader_wait(self._reader, min(left, _WAIT_NS), ctypes.byref(self._result))
                self._deliver(self._result)
            left = until - time.monotonic_ns()
        return done.get()

    def cancel(self, load: Load) -> None:
        """See Reader.cancel."""
        with self._turn:
            for number, other in self._loads.items():
                if other is load and not self._closing:
                    self._library.edge_reader_cancel(self._reader, number)

    def counts(self) -> tuple[int, int]:
        """See Reader.counts."""
        with self._turn:
            if self._unclosed.alive:
                self._library.edge_reader_counts(self._reader, self._counts)
            return self._counts[0], self._counts[1]

    def close(self, timeout_s: float) -> bool:
        """See Reader.close; slots that a read still hangs on are kept for good."""
        self._closing = True  # before the turn: a thread that waits leaves
        with self._turn:
            self.counts()  # the last ones
            first = self._unclosed.detach() is not None
            return not first or _stop(self._library, self._reader, self._memory, timeout_s)

    def _deliver(self, result: _Result) -> None:
        """Hand over what has ended, if anything has.

        Ctrl-C may come out of any call, that of the library above all: the result stays until it is handed over, and
        between the deletion and the queue nothing is called.
        """
        load = self._loads.get(result.id)
        if load is not None:
            load.started_ns, load.finished_ns, load.bytes = result.started_ns, result.finished_ns, result.bytes
            if result.problem:
                load.error = failed(self._storage.name(load.layer, load.expert), _problem(result))
            del self._loads[result.id]
            load.ended = True  # as Load.end does, but that is a call, and another thread's queue cannot be meant
            load.done.put(load)
        result.id = _NOTHING


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    library.edge_reader_start.restype = ctypes.c_void_p
    library.edge_reader_submit.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4, ctypes.c_void_p]
    library.edge_reader_cancel.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.edge_reader_cancel.restype = None
    library.edge_reader_wait.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    library.edge_reader_counts.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.edge_reader_counts.restype = None
    library.edge_reader_stop.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.edge_reader_stop.restype = ctypes.c_int64
    return library


def _files(storage: Storage, checksums: dict[tuple[int, int], int]) -> tuple[dict[tuple[int, int], int], object]:
    """What stands for every blob's file, and what reads it: descriptors and NULL, or numbers and a way back here."""
    if isinstance(storage, ExpertStorage):
        return storage.descriptors, _READ()
    keys = list(checksums)

    def read(number: int, address: int, size: int, offset: int) -> int:
        target = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        try:
            return storage.read(*keys[number], offset, target.data)
        except OSError as error:
            return -(error.errno or errno.EIO)

    return {key: number for number, key in enumerate(keys)}, _READ(read)


def _stop(library: ctypes.CDLL, reader: ctypes.c_void_p, memory: list[object], timeout_s: float) -> bool:
    if not library.edge_reader_stop(reader, int(timeout_s * 1e9)):
        return True
    _kept.extend(memory)
    return False


def _problem(result: _Result) -> str:
    texts = {
        _ERROR: os.strerror(result.error),
        _ENDED: f"the file ends after {result.offset} bytes",
        _STALLED: f"no progress after {result.offset} bytes",
        _DIFFERS: DIFFERS,
        _CANCELLED: CANCELLED,
    }
    return texts[result.problem]
