"""The compiled reader: its checksum bit for bit, the Python reader's errors, and ends that leave nothing behind."""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import random
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from runtime.errors import ReadError
from runtime.layout import expert_file, expert_identity
from runtime.loader import Loader
from runtime.native import reader
from runtime.reading import Load, cut
from runtime.storage import ExpertStorage
from runtime.thread_reader import ThreadReader
from tests.kernels import LEVELS
from tests.storages import FaultyStorage, MemoryStorage, make_cache

pytestmark = pytest.mark.usefixtures("library")
BLOB = 3 << 20
KEYS = [(0, 0), (0, 1)]


@pytest.mark.parametrize("level", LEVELS)
def test_the_checksum_is_that_of_the_package(library: ctypes.CDLL, level: str) -> None:
    data = np.frombuffer(random.Random(0).randbytes(1 << 20), np.uint8)
    found = ctypes.c_uint64()
    for blocks in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 100, 1024):
        for seed in (0, 1, expert_identity(47, 255), 1 << 63, (1 << 64) - 1):
            arguments = (ctypes.c_ssize_t(1024 * blocks), ctypes.c_uint64(seed), LEVELS[level], ctypes.byref(found))
            if library.edge_xxh3(ctypes.c_void_p(data.ctypes.data), *arguments):
                pytest.skip(f"this processor has no {level}")
            assert found.value == xxhash.xxh3_64_intdigest(data[: 1024 * blocks].data, seed=seed), (blocks, seed)


class Files:
    """Two blobs on a disk, opened as an engine opens them, and a loader of either kind over them."""

    def __init__(self, folder: Path, compiled: bool, direct: bool) -> None:
        self.content = MemoryStorage(1, 2, BLOB)
        names = {key: expert_file(*key) for key in KEYS}
        self.paths = {key: folder / name for key, name in names.items()}
        for key, path in self.paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.content.blobs[key].tobytes())
        directory = os.open(folder, os.O_RDONLY)
        self.storage = ExpertStorage(directory, names, BLOB, direct)
        os.close(directory)
        self.loader = Loader(self.storage, self.content.checksums(), BLOB, 3, compiled=compiled)

    def read(self) -> list[tuple[np.ndarray, ReadError | None]]:
        """Every blob with its error."""
        done: queue.SimpleQueue[Load] = queue.SimpleQueue()
        slots = {key: page_aligned(BLOB) for key in KEYS}
        for key, slot in slots.items():
            self.loader.submit(*key, memoryview(slot), done)
        loads = [self.loader.wait(done) for _ in KEYS]
        errors = {(load.layer, load.expert): load.error for load in loads}
        return [(slots[key], errors[key]) for key in KEYS]


def page_aligned(size: int) -> np.ndarray:
    memory = np.zeros(size + 4096, np.uint8)
    start = -memory.ctypes.data % 4096
    return memory[start : start + size]


@pytest.fixture(params=[False, True], ids=["threads", "compiled"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Files]:
    files = Files(tmp_path, request.param, direct=True)
    assert files.loader.reader == ("compiled" if request.param else "python")
    yield files
    files.loader.close()
    files.storage.close()


def test_files_arrive_byte_for_byte(files: Files) -> None:
    for _ in range(3):
        for key, (slot, error) in zip(KEYS, files.read(), strict=True):
            assert error is None
            assert np.array_equal(slot, files.content.blobs[key])
    assert files.loader.retries == 0
    assert files.loader.busy_ns() > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_buffered_files_arrive_too(tmp_path: Path, compiled: bool) -> None:
    files = Files(tmp_path, compiled, direct=False)
    assert all(error is None for _, error in files.read())
    files.loader.close()
    files.storage.close()


def test_a_file_that_became_shorter_fails_alone_and_says_where(files: Files) -> None:
    os.truncate(files.paths[0, 1], BLOB - 4096)  # seen by the last chunk alone
    (_, fine), (_, error) = files.read()
    assert fine is None
    assert f"expert_001.fp16: the file ends after {BLOB - 4096} bytes (read twice)" in str(error)
    assert files.loader.retries == 1


def test_a_changed_byte_in_a_file_is_noticed(files: Files) -> None:
    with files.paths[0, 0].open("r+b") as file:
        file.seek(BLOB - 1)
        file.write(bytes([files.content.blobs[0, 0][-1] ^ 1]))
    (_, error), (_, fine) = files.read()
    assert fine is None
    assert "expert_000.fp16: its checksum does not match the manifest (read twice)" in str(error)


def test_the_kernels_own_words_for_a_failed_read(files: Files, tmp_path: Path) -> None:
    """A descriptor that may only write fails every read with EBADF."""
    good = files.storage.descriptors[0, 0]
    spare = os.dup(good)
    writer = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    os.dup2(writer, good)
    try:
        (_, error), (_, fine) = files.read()
    finally:
        os.dup2(spare, good)
        os.close(spare)
        os.close(writer)
    assert fine is None
    assert f"expert_000.fp16: {os.strerror(9)} (read twice): run `edge verify`" in str(error)


def test_no_progress_is_an_error(library: ctypes.CDLL) -> None:
    """With O_DIRECT a read that ends inside the first page has to begin again there, but not for ever."""
    for compiled in (False, True):
        storage = FaultyStorage(1, 1, 8192, lambda *_: "one")
        storage.direct = True
        cache, loader = make_cache(storage, layers=1, slots=1, compiled=compiled)
        with pytest.raises(ReadError, match="no progress after 0 bytes"), cache.fetch(0, [0]) as request:
            list(request)
        assert storage.fired == 18  # nine without progress, twice
        loader.close()


def test_blobs_of_odd_sizes_are_left_to_python() -> None:
    storage = MemoryStorage(1, 1, 1000)
    with pytest.raises(OSError, match="1000 bytes"):
        reader.CompiledReader(storage, storage.checksums(), cut(1000, 1), 1)


class HangingStorage(MemoryStorage):
    """Reads nothing of experts from `first` on before `go` is set, nor of those before them until that has begun."""

    def __init__(self, first: int = 0) -> None:
        super().__init__(1, 2, 8192)
        self.first, self.go, self.reading = first, threading.Event(), threading.Event()

    def read(self, layer: int, expert: int, offset: int, view: memoryview) -> int:
        if expert >= self.first:
            self.reading.set()
            self.go.wait()
        self.reading.wait()
        return super().read(layer, expert, offset, view)


def test_closing_pythons_reader_waits_for_a_read_that_ends() -> None:
    """A guess may be on its way when an engine is closed, and on a GPU its slot is freed then."""
    storage, slot = HangingStorage(), np.zeros(8192, np.uint8)
    threads = ThreadReader(storage, storage.checksums(), cut(8192, 1), 1)
    for expert in range(2):  # the second waits behind the first, and is not begun any more
        threads.start(Load(0, expert, memoryview(slot), queue.SimpleQueue(), time.monotonic_ns()))
    storage.reading.wait()
    assert not threads.close(0.02)
    threading.Timer(0.05, storage.go.set).start()
    assert threads.close(30.0)
    assert np.array_equal(slot, storage.blobs[0, 0])
    assert threads.close(0.0), "the second close has nothing to wait for"


def start_reading(storage: MemoryStorage) -> tuple[reader.CompiledReader, np.ndarray]:
    """One blob on its way into a slot that nobody else keeps."""
    compiled, slot = reader.CompiledReader(storage, storage.checksums(), cut(8192, 1), 1), np.zeros(8192, np.uint8)
    compiled.start(Load(0, 0, memoryview(slot), queue.SimpleQueue(), time.monotonic_ns()))
    return compiled, slot


def test_closing_waits_for_a_read_that_ends() -> None:
    storage = HangingStorage()
    compiled, slot = start_reading(storage)
    storage.reading.wait()
    threading.Timer(0.05, storage.go.set).start()
    assert compiled.close(30.0)
    slot[:] = 7
    time.sleep(0.02)
    assert (slot == 7).all(), "a thread wrote after close"
    assert compiled.close(0.0), "the second close has nothing to wait for"


def test_nothing_is_read_after_close() -> None:
    storage = MemoryStorage(1, 2, 8192)
    compiled, slot = start_reading(storage)
    done: queue.SimpleQueue[Load] = queue.SimpleQueue()
    assert compiled.close(30.0)
    with pytest.raises(ReadError, match="expert_001.fp16: the engine was closed"):
        compiled.start(Load(0, 1, memoryview(slot), done, 0))
    assert compiled.next(done, 30.0) is None
    assert compiled.counts()[1] == 0


def test_closing_while_another_thread_waits() -> None:
    """The waiting thread is let out of the library before the reader is freed."""
    storage = HangingStorage()
    compiled, _ = start_reading(storage)
    answers: list[object] = []
    waiter = threading.Thread(target=lambda: answers.append(compiled.next(queue.SimpleQueue(), 30.0)))
    waiter.start()
    storage.reading.wait()
    threading.Timer(0.05, storage.go.set).start()
    assert compiled.close(30.0)
    waiter.join()
    assert answers == [None]


def test_a_slot_is_kept_while_a_read_hangs_on_it() -> None:
    """Whoever forgets the slot, its memory must not be given to anybody else; after a read that ended it may."""
    for hangs in (True, False):
        storage = HangingStorage()
        compiled, slot = start_reading(storage)
        kept = weakref.ref(slot)
        storage.reading.wait()
        if not hangs:
            storage.go.set()
        assert compiled.close(0.05 if hangs else 30.0) is not hangs
        del compiled, slot
        gc.collect()
        assert (kept() is not None) is hangs
        storage.go.set()


def test_a_reader_left_with_a_hanging_read_is_freed_once() -> None:
    """Memory for sums came back out of order here, and was freed twice: the process aborted."""
    storage = HangingStorage(first=1)
    compiled = reader.CompiledReader(storage, storage.checksums(), cut(8192, 1), 2)
    done: queue.SimpleQueue[Load] = queue.SimpleQueue()
    for expert in range(2):
        compiled.start(Load(0, expert, memoryview(np.zeros(8192, np.uint8)), done, time.monotonic_ns()))
    landed = compiled.next(done, 30.0)
    assert landed is not None and landed.expert == 0
    assert not compiled.close(0.05)
    threads = len(os.listdir("/proc/self/task"))
    storage.go.set()
    until = time.monotonic() + 30
    while len(os.listdir("/proc/self/task")) >= threads and time.monotonic() < until:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) < threads, "the last thread did not end"


def test_a_reader_that_nobody_closed_ends_with_its_last_reference() -> None:
    storage = MemoryStorage(1, 2, 8192)
    threads = len(os.listdir("/proc/self/task"))
    compiled, slot = start_reading(storage)
    del compiled
    gc.collect()
    assert len(os.listdir("/proc/self/task")) <= threads  # those of other tests may end meanwhile
    slot[:] = 7


@pytest.mark.parametrize("lands", ["before the interrupt is seen", "later"])
def test_an_interrupt_while_waiting_loses_no_blob(lands: str) -> None:
    """The blob lands while the interrupted thread is still in the library, or after the exception."""
    storage = HangingStorage()
    loader = Loader(storage, storage.checksums(), 8192, 1, compiled=True)
    done: queue.SimpleQueue[Load] = queue.SimpleQueue()
    loader.submit(0, 0, memoryview(np.zeros(8192, np.uint8)), done)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        if lands != "later":
            threading.Timer(0.06, storage.go.set).start()
        signal.setitimer(signal.ITIMER_REAL, 0.03)
        with pytest.raises(KeyboardInterrupt):  # not ReadError, which comes after the deadline of a minute
            loader.wait(done)
    finally:
        signal.signal(signal.SIGALRM, before)
        storage.go.set()
    assert loader.wait(done).error is None
    loader.close()
    assert loader.dead is None


def test_many_small_blobs_in_flight() -> None:
    """More blobs than threads, from slots that are read again and again; every byte is checked."""
    storage = MemoryStorage(4, 16, 4096)
    loader = Loader(storage, storage.checksums(), 4096, 4, compiled=True)
    done: queue.SimpleQueue[Load] = queue.SimpleQueue()
    slots = {key: np.zeros(4096, np.uint8) for key in storage.blobs}
    for _ in range(10):
        for key, slot in slots.items():
            slot[:] = 0
            loader.submit(*key, memoryview(slot), done)
        assert all(loader.wait(done).error is None for _ in slots)
        assert all(np.array_equal(slot, storage.blobs[key]) for key, slot in slots.items())
    assert loader.retries == 0
    loader.close()
