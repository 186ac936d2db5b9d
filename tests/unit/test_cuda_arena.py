"""Slots that a disk fills while a GPU reads them: on streams that run late, every kernel must see its own expert."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path

import pytest

from runtime.bounce import BounceStorage, reachable
from runtime.cache import ExpertCache
from runtime.config import RouterConfig
from runtime.cuda import arena as arena_module
from runtime.cuda.arena import CudaArena
from runtime.cuda.driver import Gpu
from runtime.errors import BudgetError, ReadError
from runtime.loader import Loader
from tests.storages import FaultyStorage, MemoryStorage
from tests.unit.fake_cuda import DISCRETE, ORIN, FakeCuda

BLOB = 8192
LAYERS, EXPERTS, TOP_K = 2, 9, 3
COMPUTE = 7


class Forgetful(CudaArena):
    """The negative control: nobody marks where the kernels are that read a slot."""

    def used(self, slot: int) -> None:
        pass


def make(cuda: FakeCuda, slots: int, kind: type[CudaArena] = CudaArena) -> CudaArena:
    cuda._streams.setdefault(COMPUTE, type(cuda._streams[0])())
    return kind(cuda, COMPUTE, slots, BLOB, BLOB)  # type: ignore[arg-type]


def run(
    cuda: FakeCuda, kind: type[CudaArena], per_layer: int, steps: int = 60, prefetch: int = 0
) -> list[tuple[bytes, bytes]]:
    """Decode steps of a model; returns (digest that a kernel saw, digest of its expert) for every kernel. Of guesses
    for the other layer about a third are right.
    """
    storage = MemoryStorage(LAYERS, EXPERTS, BLOB)
    loader = Loader(storage, storage.checksums(), BLOB, 2)
    arena = make(cuda, LAYERS * per_layer + prefetch, kind)
    cache = ExpertCache(range(LAYERS), RouterConfig(EXPERTS, 1), arena, loader, "lru", "layer", prefetch)
    seen: list[tuple[bytes, bytes]] = []
    chooser = random.Random(1)
    for step in range(steps):
        for layer in range(LAYERS):
            # Now and then a prompt: more experts than slots, so that slots are used again within one request.
            count = EXPERTS if step % 10 == 5 else TOP_K
            with cache.fetch(layer, chooser.sample(range(EXPERTS), count)) as request:
                cache.prefetch(1 - layer, chooser.sample(range(EXPERTS), prefetch))
                for expert, slot in request:
                    right = hashlib.sha256(storage.blobs[layer, expert].tobytes()).digest()

                    def kernel(slot=slot, right=right) -> None:  # type: ignore[no-untyped-def]
                        seen.append((hashlib.sha256(slot.numpy().tobytes()).digest(), right))

                    cuda.kernel(COMPUTE, kernel)
    cuda.synchronise(COMPUTE)
    cache.check_integrity()
    loader.close()
    arena.close()
    assert cuda.allocated == 0
    return seen


@pytest.mark.parametrize("gpu", [ORIN, DISCRETE], ids=["integrated", "discrete"])
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(("seed", "eager"), [(0, 0.0), (1, 0.5), (2, 0.9), (3, 0.99)])
def test_every_kernel_sees_its_own_expert(gpu: Gpu, seed: int, eager: float, prefetch: int) -> None:
    """120 requests over 3 or 4 slots per layer; kernels run at the last moment, the first, or anywhere between."""
    for per_layer in (TOP_K, TOP_K + 1):
        seen = run(FakeCuda(gpu, seed, eager), CudaArena, per_layer, prefetch=prefetch)
        assert len(seen) == LAYERS * (54 * TOP_K + 6 * EXPERTS)
        assert all(found == right for found, right in seen)


@pytest.mark.parametrize("gpu", [ORIN, DISCRETE], ids=["integrated", "discrete"])
def test_without_the_marks_kernels_see_other_experts(gpu: Gpu) -> None:
    """The same run with an arena that forgets them: the stress test above can fail."""
    for prefetch in (0, 2):
        seen = run(FakeCuda(gpu), Forgetful, TOP_K, prefetch=prefetch)
        assert sum(found != right for found, right in seen) > 50


def test_order_of_calls_on_a_board() -> None:
    """Landing needs nothing; a use is recorded on the compute stream; the next write waits for exactly that event."""
    cuda = FakeCuda()
    arena = make(cuda, 2)
    del cuda.log[:]
    arena.begin_write(0)
    arena.landed(0)
    assert cuda.log == []
    arena.used(0)
    arena.begin_write(1)
    arena.begin_write(0)
    (_, event, stream), waited = cuda.log
    assert stream == COMPUTE and waited == ("wait", event)


def test_order_of_calls_on_a_discrete_gpu() -> None:
    """Copy on a stream of its own, after the kernels of the old expert; compute waits for the copy; the host slot is
    free again when the copy is done, however late the kernels are."""
    cuda = FakeCuda(DISCRETE)
    arena = make(cuda, 1)
    del cuda.log[:]
    arena.landed(0)
    arena.used(0)
    arena.begin_write(0)
    arena.landed(0)
    names = [entry[0] for entry in cuda.log]
    assert names == ["copy", "record", "stream_wait", "record", "wait", "stream_wait", "copy", "record", "stream_wait"]
    copied, used = cuda.log[1][1], cuda.log[3][1]
    copies = cuda.log[0][4]
    assert copies != COMPUTE
    assert cuda.log[1:6] == [
        ("record", copied, copies),
        ("stream_wait", COMPUTE, copied),
        ("record", used, COMPUTE),
        ("wait", copied),
        ("stream_wait", copies, used),
    ]


def test_chunks_are_small_and_hold_whole_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "CHUNK_BYTES", 5 * BLOB + 1)
    cuda = FakeCuda()
    arena = make(cuda, 12)
    assert [size for name, size in cuda.log] == [5 * BLOB, 5 * BLOB, 2 * BLOB]
    assert len(arena.views) == len(arena.tensors) == 12 and arena.size_bytes == 12 * BLOB
    for slot in range(12):
        arena.views[slot][:] = bytes([slot]) * BLOB
    assert [bytes(t.numpy().tobytes()) for t in arena.tensors] == [bytes([slot]) * BLOB for slot in range(12)]
    arena.close()
    arena.close()
    assert cuda.allocated == 0


@pytest.mark.parametrize("gpu", [ORIN, DISCRETE], ids=["integrated", "discrete"])
def test_too_little_memory_gives_everything_back(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "CHUNK_BYTES", 4 * BLOB)
    cuda = FakeCuda(gpu, memory_bytes=11 * BLOB)
    with pytest.raises(BudgetError, match=r"cudaHostAlloc of .* MB failed|cudaMalloc of .* failed") as caught:
        make(cuda, 12)
    assert "of 0 MB of expert slots were there by then" in str(caught.value)
    assert cuda.allocated == 0


class Unreachable(MemoryStorage):
    """A disk that reaches ordinary memory only, as a driver may have it."""

    def __init__(self, forbidden: memoryview, number: int | None) -> None:
        super().__init__(1, 3, BLOB)
        self._forbidden, self._number = forbidden, number

    def read(self, layer: int, expert: int, offset: int, view: memoryview) -> int:
        inside = view.obj is self._forbidden.obj
        if inside and self._number is not None:
            raise OSError(self._number, "Bad address")
        count = super().read(layer, expert, offset, view)
        if inside:
            view[7] ^= 1
        return count


@pytest.mark.parametrize("number", [errno.EFAULT, errno.EINVAL, None])
def test_a_disk_that_cannot_reach_the_slots_goes_through_a_buffer(number: int | None) -> None:
    arena = make(FakeCuda(), 2)
    disk = Unreachable(arena.views[0], number)
    storage, note = reachable(disk, (0, 1), arena.views[0])
    assert isinstance(storage, BounceStorage)
    assert note.startswith("reads: through a buffer, because the disk cannot fill the GPU's memory itself (")
    assert storage.read(0, 2, 4096, arena.views[0][100:4196]) == 4096
    assert arena.views[0][100:4196] == disk.blobs[0, 2][4096:].tobytes()
    assert storage.name(0, 2) == disk.name(0, 2)


def test_a_disk_that_reaches_them_is_used_as_it_is() -> None:
    arena, disk = make(FakeCuda(), 2), MemoryStorage(1, 3, BLOB)
    assert reachable(disk, (0, 1), arena.views[0]) == (disk, "")


def test_a_disk_that_fails_is_no_question_of_memory() -> None:
    disk = FaultyStorage(1, 1, BLOB, lambda count, layer, expert: "eio")
    with pytest.raises(ReadError, match=r"expert_000\.fp16: Input/output error"):
        reachable(disk, (0, 0), make(FakeCuda(), 1).views[0])


def test_real_reads_past_the_page_cache_into_slots(tmp_path: Path) -> None:
    """The loader's own way with O_DIRECT, where the file system has it: slots start on pages."""
    from runtime.storage import ExpertStorage

    data = random.Random(3).randbytes(BLOB)
    (tmp_path / "blob").write_bytes(data)
    directory = os.open(tmp_path, os.O_RDONLY)
    disk = ExpertStorage(directory, {(0, 0): "blob"}, BLOB, direct=True)
    arena = make(FakeCuda(), 2)
    storage, _ = reachable(disk, (0, 0), arena.views[1])
    assert storage.read(0, 0, 0, arena.views[1]) == BLOB
    assert bytes(arena.views[1]) == data
