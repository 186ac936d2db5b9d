"""The expert cache against a plain model of it, and its books after every kind of end."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cache import ExpertCache
from runtime.policies import POLICIES, make_policy
from tests.storages import MemoryStorage, make_cache, residents

EXPERTS, BLOB = 6, 8192
STORAGE = MemoryStorage(layers=2, experts=EXPERTS, blob_bytes=BLOB)


def consume(cache: ExpertCache, layer: int, experts: list[int]) -> list[int]:
    """Fetch and check every byte; gives the order of arrival."""
    order = []
    with cache.fetch(layer, experts) as request:
        for expert, slot in request:
            assert np.array_equal(slot.numpy().view(np.uint8), STORAGE.blobs[layer, expert]), (layer, expert)
            order.append(expert)
    cache.check_integrity()
    return order


def test_residents_come_first_and_every_expert_once() -> None:
    cache, loader = make_cache(STORAGE, layers=2, slots=8)
    assert sorted(consume(cache, 0, [3, 1])) == [1, 3]
    order = consume(cache, 0, [5, 3, 2, 1])
    assert order[:2] == [3, 1]
    assert sorted(order[2:]) == [2, 5]
    stats = cache.take_stats()
    assert (stats.hits, stats.misses) == ([2, 0], [4, 0])
    assert stats.bytes == 4 * BLOB
    loader.close()


def test_residents_together_then_each_miss() -> None:
    cache, loader = make_cache(STORAGE, layers=2, slots=4)  # two slots per layer: misses must wait for residents
    consume(cache, 0, [3, 1])
    with cache.fetch(0, [5, 3, 2, 1]) as request:
        with request.residents() as held:
            assert [expert for expert, _ in held] == [3, 1]
            for expert, slot in held:
                assert np.array_equal(slot.numpy().view(np.uint8), STORAGE.blobs[0, expert])
        assert sorted(expert for expert, _ in request) == [2, 5]
    cache.check_integrity()
    assert residents(cache, 0) == {5, 2}
    with cache.fetch(0, [0]) as request, request.residents() as held:
        assert held == []
    cache.check_integrity()
    loader.close()


def test_more_experts_than_slots_are_read_once_each() -> None:
    cache, loader = make_cache(STORAGE, layers=2, slots=4)  # two slots per layer
    assert sorted(consume(cache, 1, [0, 1, 2, 3, 4, 5])) == [0, 1, 2, 3, 4, 5]
    stats = cache.take_stats()
    assert (stats.misses, stats.evictions) == ([0, 6], 4)
    loader.close()


def test_lru_keeps_what_was_used_last() -> None:
    cache, loader = make_cache(STORAGE, layers=2, slots=4)
    for experts in ([0, 1], [0, 2], [2, 3]):
        consume(cache, 0, experts)
    assert residents(cache, 0) == {2, 3}
    assert cache.take_stats().hits == [2, 0]
    loader.close()


def test_shared_scope_moves_slots_between_layers() -> None:
    cache, loader = make_cache(STORAGE, layers=2, slots=4, scope="shared")
    consume(cache, 0, [0, 1, 2, 3])
    consume(cache, 1, [4])
    assert (residents(cache, 0), residents(cache, 1)) == ({1, 2, 3}, {4})
    loader.close()


def test_leaving_a_request_early_loses_no_slot() -> None:
    cache, loader = make_cache(STORAGE, layers=2, slots=8)
    consume(cache, 0, [0, 1])
    with cache.fetch(0, [0, 1, 2, 3]) as request:
        for _ in request:
            break
    cache.check_integrity()
    assert sorted(consume(cache, 0, [4, 5, 0, 1])) == [0, 1, 4, 5]
    loader.close()


def test_clear_makes_the_next_request_cold() -> None:
    cache, loader = make_cache(STORAGE, layers=2, slots=8)
    consume(cache, 0, [0, 1])
    cache.clear()
    cache.check_integrity()
    cache.take_stats()
    consume(cache, 0, [0, 1])
    assert cache.take_stats().misses == [2, 0]
    loader.close()


class PlainCache:
    """The definition of a per-layer cache in a few lines: hits are touched, then misses enter, in request order."""

    def __init__(self, slots: int, policy: str) -> None:
        self.policy = make_policy(policy, range(EXPERTS), np.zeros(EXPERTS))
        self.slots, self.inside = slots, set[int]()

    def request(self, experts: list[int]) -> tuple[int, int]:
        hits = [e for e in experts if e in self.inside]
        for expert in hits:
            self.policy.touch(expert)
        for expert in experts:
            if expert not in hits:
                if len(self.inside) == self.slots:
                    victim = self.policy.victim(set(experts))
                    self.policy.remove(victim)
                    self.inside.remove(victim)  # type: ignore[arg-type]
                self.policy.insert(expert)
                self.inside.add(expert)
        return len(hits), len(experts) - len(hits)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(0, EXPERTS - 1), min_size=1, max_size=3, unique=True), max_size=25),
    slots=st.integers(3, EXPERTS),
    policy=st.sampled_from(sorted(POLICIES)),
)
def test_agrees_with_the_plain_cache(requests: list[list[int]], slots: int, policy: str) -> None:
    cache, loader = make_cache(STORAGE, layers=1, slots=slots, policy=policy)
    plain = PlainCache(slots, policy)
    for experts in requests:
        cache.take_stats()
        consume(cache, 0, experts)
        stats = cache.take_stats()
        assert (stats.hits[0], stats.misses[0]) == plain.request(experts)
        assert residents(cache, 0) == plain.inside
    loader.close()
