"""Experts read on a guess: right and wrong ones, of which none may change a bit, a hit, or what is in the cache."""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.exporter import export_bundle
from runtime.budget import Slots, guesses
from runtime.bundle import Bundle
from runtime.cache import CacheStats, ExpertCache
from runtime.engine import Engine, EngineOptions, GenerateOptions
from runtime.errors import ReadError, UsageError
from runtime.loader import Loader
from runtime.policies import POLICIES
from runtime.reading import Load
from runtime.replay import Steps
from tests.checkpoints import make_checkpoint
from tests.storages import FaultyStorage, MemoryStorage, make_cache, residents

EXPERTS, BLOB = 6, 8192
STORAGE = MemoryStorage(layers=2, experts=EXPERTS, blob_bytes=BLOB)
IDS = [5, 6, 7, 8]


def consume(cache: ExpertCache, layer: int, experts: list[int], storage: MemoryStorage = STORAGE) -> CacheStats:
    """Fetch, check every byte and the books, and give what was counted."""
    with cache.fetch(layer, experts) as request:
        for expert, slot in request:
            assert np.array_equal(slot.numpy().view(np.uint8), storage.blobs[layer, expert]), (layer, expert)
    cache.check_integrity()
    return cache.take_stats()


def wait_for_reads(loader: Loader) -> None:
    """Until nothing is on its way."""
    busy = -1
    while busy != (busy := loader.busy_ns()):
        time.sleep(0.01)


def test_a_right_guess_is_the_miss_that_it_would_have_been(compiled: bool) -> None:
    cache, loader = make_cache(STORAGE, layers=2, slots=8, compiled=compiled, prefetch=2)
    cache.prefetch(0, [3, 5, 1])  # one more than there are slots for
    cache.prefetch(0, [3, 5, 1])  # these are on their way
    stats = consume(cache, 0, [1, 3, 5])
    assert (stats.hits, stats.misses, stats.missed) == ([0, 0], [3, 0], [[1, 3, 5], []])
    assert (stats.bytes, stats.prefetched, stats.wasted_bytes) == (3 * BLOB, 2, 0)
    assert residents(cache, 0) == {1, 3, 5}
    assert consume(cache, 0, [3, 5]).hits == [2, 0]
    loader.close()


def test_a_wrong_guess_is_counted_and_its_slot_comes_back(compiled: bool) -> None:
    cache, loader = make_cache(STORAGE, layers=2, slots=8, compiled=compiled, prefetch=1)
    for expert in range(4):
        cache.prefetch(1, [expert])
        stats = consume(cache, 1, [expert + 1])
        assert (stats.misses[1], stats.prefetched) == (1, 0)
        assert residents(cache, 1) == set(range(1, expert + 2))
    cache.prefetch(0, [0])
    wait_for_reads(loader)
    wasted = consume(cache, 0, [1]).wasted_bytes
    cache.prefetch(0, [5])  # takes the slot back, and with it what is known of the read by now
    assert wasted + consume(cache, 0, [5]).wasted_bytes == BLOB
    loader.close()


def test_what_is_here_already_is_not_read(compiled: bool) -> None:
    cache, loader = make_cache(STORAGE, layers=2, slots=8, compiled=compiled, prefetch=2)
    consume(cache, 0, [3])
    cache.prefetch(0, [3])
    stats = consume(cache, 0, [3])
    assert (stats.hits[0], stats.bytes, stats.wasted_bytes) == (1, 0, 0)
    loader.close()


def test_a_guess_that_landed_before_it_was_asked_for(compiled: bool) -> None:
    cache, loader = make_cache(STORAGE, layers=2, slots=8, compiled=compiled, prefetch=1)
    cache.prefetch(1, [2])
    wait_for_reads(loader)
    assert consume(cache, 1, [2]).prefetched == 1
    loader.close()


@pytest.mark.parametrize("scope", ["layer", "shared"])
def test_books_and_bytes_under_random_guesses(compiled: bool, scope: Any) -> None:
    """Against a cache without: equal hits and misses and equal contents after every request, for every policy."""
    for policy in POLICIES:
        rng = random.Random(policy)
        plain, first = make_cache(STORAGE, layers=2, slots=8, policy=policy, scope=scope, compiled=compiled)
        cache, second = make_cache(
            STORAGE, layers=2, slots=8, policy=policy, scope=scope, compiled=compiled, prefetch=2
        )
        right = 0
        for _ in range(100):
            layer, experts = rng.randrange(2), rng.sample(range(EXPERTS), rng.choice([1, 2, 3]))
            cache.prefetch(rng.randrange(2), rng.sample(range(EXPERTS), 3))
            scores = torch.randn(1, EXPERTS)
            for each in (plain, cache):
                each.saw(layer, scores, torch.tensor([experts]))
            wanted, found = consume(plain, layer, experts), consume(cache, layer, experts)
            assert (found.hits, found.missed, found.evictions) == (wanted.hits, wanted.missed, wanted.evictions)
            assert [residents(cache, n) for n in (0, 1)] == [residents(plain, n) for n in (0, 1)]
            right += found.prefetched
        assert right > 5
        cache.use_policy(policy)  # all slots but those beside it, wherever they are by now
        cache.check_integrity()
        assert consume(cache, 0, [0, 1, 2, 3]).misses[0] == 4
        first.close()
        second.close()


def test_a_bad_blob_fails_whoever_asks_for_it_and_no_one_else(compiled: bool) -> None:
    storage = FaultyStorage(2, EXPERTS, BLOB, lambda _count, _layer, expert: "flip" if expert == 3 else None)
    cache, loader = make_cache(storage, layers=2, slots=8, compiled=compiled, prefetch=1)
    cache.prefetch(0, [3])
    assert consume(cache, 0, [1], storage).misses[0] == 1  # the guess was wrong, and so was the blob
    for _ in range(2):
        cache.prefetch(1, [3])
        with pytest.raises(ReadError, match=r"expert_003.fp16.*edge verify"), cache.fetch(1, [3, 4]) as request:
            list(request)
        cache.check_integrity()
        cache.take_stats()
    storage.fault = lambda *_: None
    assert consume(cache, 1, [3, 4], storage).hits == [0, 1]
    loader.close()


LARGE = 8 << 20  # four chunks for one thread


class GatedStorage(MemoryStorage):
    """Expert 0 is read no further than its first chunk before `go` is set; `reading` says that the next has begun."""

    def __init__(self) -> None:
        super().__init__(1, 2, LARGE)
        self.go, self.reading = threading.Event(), threading.Event()

    def read(self, layer: int, expert: int, offset: int, view: memoryview) -> int:
        if expert == 0 and offset:
            self.reading.set()
            self.go.wait()
        return super().read(layer, expert, offset, view)


def test_a_cancelled_read_ends_early_and_holds_nobody_up(compiled: bool) -> None:
    storage, done = GatedStorage(), queue.SimpleQueue[Load]()
    loader = Loader(storage, storage.checksums(), LARGE, 1, compiled=compiled)
    slots = [np.zeros(LARGE, np.uint8) for _ in range(2)]
    loads = [loader.submit(0, expert, memoryview(slot), done) for expert, slot in enumerate(slots)]
    storage.reading.wait()
    assert loader.ended(done) is None
    loader.cancel(loads[0])
    storage.go.set()
    assert [loader.wait(done) for _ in loads] == loads
    assert "expert_000.fp16: it is not wanted any more" in str(loads[0].error)
    assert 0 < loads[0].bytes < LARGE
    assert loads[1].error is None and np.array_equal(slots[1], storage.blobs[0, 1])
    assert loads[1].bytes == LARGE
    assert loader.retries == 0
    loader.cancel(loads[1])  # it has ended: nothing happens
    assert loader.ended(done) is None
    loader.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefetch")
    export_bundle(make_checkpoint(folder / "checkpoint", "qwen2_moe"), folder / "bundle")
    return folder / "bundle"


def run(bundle: Path, **options: Any) -> tuple[list[int], list[Any], dict[str, Any]]:
    """Token ids, what each token found in the cache, and the report."""
    with Engine.open(bundle, EngineOptions(slots_per_layer=4, context=64, **options)) as engine:
        tokens = list(engine.generate(IDS, GenerateOptions(30, ignore_eos=True)))
        engine.check_integrity()
        cached = [(t.record.hits, t.record.missed, t.record.evictions) for t in tokens]
        return [t.id for t in tokens], cached, engine.report() | {"records": [t.record for t in tokens]}


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize("routing", ["stock", "cache-prior"])
def test_the_engine_says_and_caches_what_it_would_without(bundle: Path, backend: str, routing: str) -> None:
    ids, cached, plain = run(bundle, backend=backend, routing=routing, prefetch=0)
    for wish, count in ((None, 1), (1, 1), (3, 3)):
        found = run(bundle, backend=backend, routing=routing, prefetch=wish)
        assert found[:2] == (ids, cached)
        records, slot = found[2]["records"], 16384
        assert found[2]["expert_budget_bytes"] == plain["expert_budget_bytes"] + count * slot
        assert found[2]["memory_plan_bytes"]["expert_bytes"] == found[2]["expert_budget_bytes"]
        assert found[2]["prefetch"] == count and found[2]["prefetched_share"] > 0.1
        for record in records:
            assert record.bytes == sum(record.misses) * slot + record.wasted_bytes
            assert record.prefetched <= sum(record.misses[1:])  # nobody guesses for the first layer
    assert plain["prefetched_share"] == plain["prefetch"] == 0


@pytest.mark.parametrize(
    ("budget", "wish", "per_layer", "count"),
    [
        (15, 0, 5, 0),
        (15, 1, 4, 1),
        (15, None, 5, 0),  # nothing is left for a guess, and a slot less in every layer would cost more
        (16, None, 5, 1),
        (17, None, 5, 1),
        (22, None, 7, 0),  # all experts are here: there is nothing to guess
    ],
)
def test_the_memory_for_guesses_is_part_of_the_budget(
    bundle: Path, budget: int, wish: int | None, per_layer: int, count: int
) -> None:
    options = EngineOptions(expert_memory_bytes=budget * 16384, context=64, prefetch=wish)
    with Engine.open(bundle, options) as engine:
        assert (engine.slots.per_layer, engine.settings()["prefetch"]) == (per_layer, count)
        assert engine.expert_budget_bytes == (3 * per_layer + count) * 16384


def test_no_guesses_by_default_on_a_gpu(bundle: Path) -> None:
    with contextlib.closing(Bundle.open(bundle)) as opened:
        assert [guesses(opened.config, Slots(12, 4), name, 1) for name in ("onnxruntime", "cuda")] == [1, 0]


def test_refusals(bundle: Path) -> None:
    for count, words in ((-1, "expected 0"), (4, "expected 0 to 3, the experts of a token")):
        with pytest.raises(UsageError, match=f"--prefetch {count}: {words}"):
            Engine.open(bundle, EngineOptions(prefetch=count))
    with Engine.open(bundle, EngineOptions(prefetch=1)) as engine, pytest.raises(UsageError, match="cannot be guessed"):
        engine.replay(Steps((0, 1, 2), 7, np.zeros((1, 3, 3)), np.zeros((1, 3, 3))))


def test_the_guess_is_what_the_next_gate_makes_of_this_hidden_state(bundle: Path) -> None:
    with Engine.open(bundle, EngineOptions(context=64)) as engine:
        h = torch.randn(1, engine.config.hidden_size)
        assert engine.router.guess(1, h) == engine.router.route(1, h).experts[0].tolist()
        engine.use_router("base", prior=None)
    with Engine.open(bundle, EngineOptions(context=64, routing="cache-prior", prior_strength=0.5)) as engine:
        list(engine.generate(IDS, GenerateOptions(4)))
        router = engine.decoder.router
        before = router.agreement  # type: ignore[attr-defined]
        guessed = router.guess(1, h)
        assert router.agreement == before  # type: ignore[attr-defined] - a guess counts as no token
        assert len(guessed) == 3
