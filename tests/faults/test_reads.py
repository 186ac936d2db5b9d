"""Reads that fail: once they heal, for good they fail one request, and the cache stays whole. Every fault fires."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from runtime.errors import ReadError
from runtime.reading import CHUNK_BYTES, cut
from tests.storages import FaultyStorage, MemoryStorage, make_cache, residents

BLOB = 3 * 4096


def fetch(storage: MemoryStorage, cache, experts: list[int]) -> None:  # type: ignore[no-untyped-def]
    with cache.fetch(0, experts) as request:
        for expert, slot in request:
            assert np.array_equal(slot.numpy().view(np.uint8), storage.blobs[0, expert])


@pytest.mark.parametrize("kind", ["eio", "flip", "end"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_one_bad_read_heals(kind: str, number: int, compiled: bool) -> None:
    storage = FaultyStorage(1, 6, BLOB, lambda count, *_: kind if count == number else None)
    cache, loader = make_cache(storage, layers=1, slots=4, compiled=compiled)
    fetch(storage, cache, [0, 1, 2, 3])
    cache.check_integrity()
    assert storage.fired == 1
    assert loader.retries == 1
    loader.close()


@pytest.mark.parametrize("kind", ["eio", "flip", "end"])
@pytest.mark.parametrize("bad", [0, 3])
def test_a_bad_blob_fails_its_request_and_only_that(kind: str, bad: int, compiled: bool) -> None:
    storage = FaultyStorage(1, 6, BLOB, lambda _count, _layer, expert: kind if expert == bad else None)
    cache, loader = make_cache(storage, layers=1, slots=4, compiled=compiled)
    with pytest.raises(ReadError, match=f"expert_{bad:03d}.fp16.*edge verify"):
        fetch(storage, cache, [0, 1, 2, 3])
    cache.check_integrity()
    assert storage.fired >= 2
    storage.fault = lambda *_: None
    fetch(storage, cache, [0, 1, 2, 3])
    assert residents(cache, 0) == {0, 1, 2, 3}
    loader.close()


@pytest.mark.parametrize("kind", ["short", "one"])
def test_short_reads_go_on(kind: str, compiled: bool) -> None:
    storage = FaultyStorage(1, 2, 4096, lambda count, *_: kind if count % 2 else None)
    cache, loader = make_cache(storage, layers=1, slots=2, compiled=compiled)
    fetch(storage, cache, [0, 1])
    assert storage.fired >= 2
    assert loader.retries == 0
    loader.close()


def test_a_blob_of_several_chunks_is_hashed_in_order(compiled: bool) -> None:
    storage = MemoryStorage(1, 2, 5 << 20)
    cache, loader = make_cache(storage, layers=1, slots=2, threads=4, compiled=compiled)
    fetch(storage, cache, [0, 1])
    assert storage.reads == 8
    assert loader.retries == 0
    loader.close()


@pytest.mark.parametrize(("size", "count"), [(4096, 1), (262144, 1), (300 << 10, 2), (5 << 20, 4), (17301504, 12)])
def test_chunks_cover_the_blob_in_whole_pages(size: int, count: int) -> None:
    chunks = cut(size, threads=4)
    assert len(chunks) == count
    assert [chunks[0][0], chunks[-1][1]] == [0, size]
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(chunks))
    assert all(begin % 4096 == 0 and 0 < end - begin < 2 * CHUNK_BYTES for begin, end in chunks)


def test_the_last_round_of_chunks_is_small() -> None:
    """14 MiB for 4 threads are eight chunks: four of 3/16 and four of 1/16."""
    sizes = [end - begin for begin, end in cut(14 << 20, threads=4)]
    assert sizes == [(14 << 20) * 3 // 16] * 4 + [(14 << 20) // 16] * 4


def test_swapped_blobs_are_noticed(compiled: bool) -> None:
    storage = MemoryStorage(1, 3, BLOB)
    cache, loader = make_cache(storage, layers=1, slots=3, compiled=compiled)
    storage.blobs[0, 0], storage.blobs[0, 1] = storage.blobs[0, 1], storage.blobs[0, 0]
    with pytest.raises(ReadError, match="checksum does not match"):
        fetch(storage, cache, [0])
    loader.close()


def test_equal_bytes_of_another_expert_are_noticed() -> None:
    """Two experts with the same bytes still have different checksums: the identity is part of them."""
    storage = MemoryStorage(1, 2, BLOB)
    storage.blobs[0, 1] = storage.blobs[0, 0]
    sums = storage.checksums()
    assert sums[0, 0] != sums[0, 1]


def test_a_disk_that_hangs_fails_at_the_deadline(compiled: bool) -> None:
    storage = FaultyStorage(1, 2, BLOB, lambda count, *_: "hang" if count == 1 else None)
    cache, loader = make_cache(storage, layers=1, slots=2, threads=1, deadline_s=0.2, compiled=compiled)
    with pytest.raises(ReadError, match="did not answer"):
        fetch(storage, cache, [0])
    with pytest.raises(ReadError, match="did not answer"):
        fetch(storage, cache, [1])
    cache.check_integrity()
    assert storage.fired == 1
    loader.close()
