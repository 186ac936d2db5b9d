"""The simulator counts what the engine counts, exactly; Belady is what brute force finds; libcachesim agrees."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.exporter import export_bundle
from remoe.pools import PolicyPool
from remoe.record import choice_bias, info_of, record_generation, record_text, watching
from remoe.simulate import SIMULATED, Result, Setting, share_of_optimum, simulate
from remoe.trace import Origin, Trace
from runtime.cache_prior import CachePrior
from runtime.engine import Engine, EngineOptions, GenerateOptions
from runtime.errors import BudgetError, UsageError
from runtime.policies import FIFO, POLICIES, make_policy
from runtime.records import TokenRecord
from tests.checkpoints import make_checkpoint
from tests.storages import MemoryStorage, make_cache, residents
from tests.traces import random_trace, written_trace

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20], [5, 6, 90, 91, 92, 93]]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("simulate"), {}
    for family in ("olmoe", "deepseek_v2", "deepseek_v3"):
        checkpoint = make_checkpoint(folder / family, family)
        made[family] = folder / f"{family}.bundle"
        export_bundle(checkpoint, made[family])
    return made


def counted(engine: Engine, cold: bool, logits: bool = False) -> tuple[Trace, list[list[TokenRecord]]]:
    """A trace of PROMPTS, and what the engine says about each token."""
    blocks, records = [], []
    with watching(engine, logits=logits) as watcher:
        for number, prompt in enumerate(PROMPTS):
            if cold:
                engine.empty_cache()
            block = record_generation(engine, watcher, number, prompt, GenerateOptions(9, ignore_eos=True))
            assert block is not None
            blocks.append(block)
            assert engine._run is not None
            records.append(list(engine._run.records))
    info = info_of(engine, "generated", Origin("prompts", "0" * 64))
    return Trace.from_blocks(info, blocks, choice_bias(engine)), records


def assert_same(result: Result, trace: Trace, records: list[list[TokenRecord]]) -> None:
    for number, (rows, found) in enumerate(zip(trace.request_rows(), records, strict=True)):
        assert result.prompt_hits[number].tolist() == found[0].hits
        assert result.prompt_misses[number].tolist() == found[0].misses
        decode = [row for row in rows if trace.decode[row]]
        assert [result.missed[row].tolist() for row in decode] == [record.misses for record in found[1:]]
    decoded = [record for found in records for record in found[1:]]
    assert (result.hits, result.misses) == tuple(
        sum(sum(getattr(record, name)) for record in decoded) for name in ("hits", "misses")
    )
    assert result.bytes == sum(record.bytes - record.wasted_bytes for record in decoded)


@pytest.mark.parametrize("scope", ["layer", "shared"])
@pytest.mark.parametrize("policy", POLICIES)
def test_agrees_with_the_engine(bundles: dict[str, Path], policy: str, scope: Any) -> None:
    """Three experts of ten per token, five slots: prompts ask for more experts than there are slots."""
    options = EngineOptions(slots_per_layer=5, policy=policy, scope=scope, context=64, dtype="fp32")
    with Engine.open(bundles["olmoe"], options) as engine:
        slots = {"slots_per_layer": 5} if scope == "layer" else {"shared_slots": engine.slots.total}
        for cold in (True, False):
            engine.empty_cache()
            trace, records = counted(engine, cold, logits=policy == "gate")
            assert_same(simulate(trace, Setting(policy, **slots, cold=cold)), trace, records)


@pytest.mark.parametrize("slots", [3, 4, 9])
def test_agrees_at_every_size_where_some_layers_have_no_experts(bundles: dict[str, Path], slots: int) -> None:
    with Engine.open(bundles["deepseek_v2"], EngineOptions(slots_per_layer=slots, dtype="fp32")) as engine:
        trace, records = counted(engine, cold=False)
    assert trace.info.moe_layers == (1, 2)
    assert_same(simulate(trace, Setting("lru", slots, cold=False)), trace, records)


def test_agrees_when_a_prompt_takes_several_chunks(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("runtime.decoder", "remoe.record"):
        monkeypatch.setattr(f"{module}.prefill_chunk", lambda config: 4)
    with Engine.open(bundles["olmoe"], EngineOptions(slots_per_layer=5, dtype="fp32")) as engine:
        trace, records = counted(engine, cold=True)  # the first prompt: chunks of 4, 4 and 1 tokens
    assert trace.info.prefill_chunk == 4
    assert_same(simulate(trace, Setting("lru", 5)), trace, records)


@pytest.mark.parametrize(
    ("family", "scope", "scaling", "slots"),
    [
        ("olmoe", "layer", "mean", 5),
        ("olmoe", "shared", "token", 5),
        ("olmoe", "layer", "energy", 10),  # free slots for as long as an expert was never needed
        ("deepseek_v3", "shared", "mean", 5),
        ("deepseek_v3", "layer", "energy", 5),
    ],
)
def test_cache_prior_in_the_engine_and_from_its_own_logits(
    bundles: dict[str, Path], family: str, scope: Any, scaling: Any, slots: int
) -> None:
    """Replaying what a cache-prior engine chose gives its counts; routing its logits again gives its choice."""
    prior = CachePrior(0.2, 1, scaling)
    options = EngineOptions(
        slots_per_layer=slots,
        scope=scope,
        dtype="fp32",
        routing="cache-prior",
        prior_strength=0.2,
        prior_scaling=scaling,
    )
    with Engine.open(bundles[family], options) as engine:
        trace, records = counted(engine, cold=True, logits=True)
        total = engine.slots.total
    sizes: dict[str, Any] = {"slots_per_layer": slots} if scope == "layer" else {"shared_slots": total}
    assert trace.info.routing == f"cache-prior strength=0.2 top_j=1 scaling={scaling}"
    assert_same(simulate(trace, Setting("lru", **sizes)), trace, records)
    again = simulate(trace, Setting("lru", **sizes, prior=prior))
    assert (again.experts == trace.experts).mean() > 0.98  # fp16 logits: a tie may fall the other way
    assert again.agreement is not None
    assert 0.3 < again.agreement < 1


def test_a_text_read_at_once_is_routed_as_token_by_token(bundles: dict[str, Path]) -> None:
    with Engine.open(bundles["olmoe"], EngineOptions(slots_per_layer=5, dtype="fp32")) as engine:
        with watching(engine, hidden=True) as watcher:
            once, steps = (record_text(engine, watcher, 0, PROMPTS[0], stepwise) for stepwise in (False, True))
        info = info_of(engine, "teacher-forced", Origin("text", "0" * 64))
    assert once is not None and steps is not None
    assert np.array_equal(once.experts, steps.experts)
    trace = Trace.from_blocks(info, [once])
    assert trace.decode.all()
    assert trace.hidden is not None and trace.hidden.shape == (9, 3, 64)


class UnevenStorage(MemoryStorage):
    """Some experts take longer to read, so that reads land out of order."""

    def read(self, layer: int, expert: int, offset: int, view: memoryview) -> int:
        time.sleep(0.001 * (expert * 7 % 5))
        return super().read(layer, expert, offset, view)


STORAGE = UnevenStorage(layers=1, experts=9, blob_bytes=8192)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True), max_size=12),
    slots=st.integers(1, 6),
    policy=st.sampled_from(sorted(POLICIES)),
)
def test_agrees_with_the_cache_on_requests_of_any_size(requests: list[list[int]], slots: int, policy: str) -> None:
    """Also on those for more experts than there are slots, whose reads land in any order."""
    cache, loader = make_cache(STORAGE, layers=1, slots=slots, policy=policy, threads=4)
    pool = PolicyPool(slots, make_policy(policy, range(9), np.zeros(9)))
    for keys in requests:
        cache.take_stats()
        with cache.fetch(0, keys) as request:
            for _ in request:
                pass
        assert pool.request(keys) == cache.take_stats().misses[0]
        assert pool.resident == residents(cache, 0)
    loader.close()


def test_counts_by_hand() -> None:
    """One layer, two slots, one expert per token: LRU drops what was used longest ago, FIFO what came first."""
    trace = written_trace([[[e]] for e in (0, 1, 0, 2, 0, 1)], experts=3)
    lru, fifo, best = (simulate(trace, Setting(policy, 2)) for policy in ("lru", "fifo", "belady"))
    assert lru.missed[:, 0].tolist() == [1, 1, 0, 1, 0, 1]
    assert fifo.missed[:, 0].tolist() == [1, 1, 0, 1, 1, 1]
    assert best.missed[:, 0].tolist() == [1, 1, 0, 1, 0, 1]
    assert (lru.requests, lru.hits, lru.misses, lru.unique_hit_rate) == (6, 2, 4, 2 / 6)
    assert (lru.bytes, lru.bytes_per_token) == (4 * 4096, 4 * 4096 / 6)
    assert (share_of_optimum(fifo, best), share_of_optimum(best, best)) == (4 / 5, 1.0)
    assert lru.misses_by_layer.tolist() == [4]
    assert lru.misses_by_token.tolist() == [1, 1, 0, 1, 0, 1]


def test_fifo_forgets_uses() -> None:
    policy = FIFO()
    for key in "abc":
        policy.insert(key)
    policy.touch("a")
    assert policy.victim({"c"}) == "a"


def test_cold_empties_the_cache_between_requests() -> None:
    trace = written_trace([[[0]], [[0]], [[0]], [[1]]], experts=2, requests=[0, 0, 1, 1])
    assert simulate(trace, Setting("lru", 2, cold=True)).missed[:, 0].tolist() == [1, 0, 1, 1]
    assert simulate(trace, Setting("lru", 2, cold=False)).missed[:, 0].tolist() == [1, 0, 0, 1]


def test_prompts_may_be_left_out() -> None:
    trace = random_trace([(6, 4)])
    with_prompt, without = (simulate(trace, Setting("lru", 8, prompt=p)) for p in ("replay", "skip"))
    assert without.prompt_misses.sum() == 0 < with_prompt.prompt_misses.sum()
    assert with_prompt.requests == without.requests == 4 * 2 * 2
    assert with_prompt.misses < without.misses  # with a slot for each expert, a prompt can only help


def test_at_top_k_slots_every_policy_is_the_same() -> None:
    """All slots hold the experts of one token: nobody has a choice, and misses are K (1 - overlap)."""
    trace = random_trace([(0, 30), (0, 20)], layers=3, experts=8, top_k=3)
    found = {simulate(trace, Setting(policy, 3)).misses for policy in SIMULATED}
    pairs = [(row - 1, row) for rows in trace.request_rows() for row in rows[1:]]
    kept = sum(
        len(set(trace.experts[a, layer].tolist()) & set(trace.experts[b, layer].tolist()))
        for a, b in pairs
        for layer in range(3)
    )
    assert found == {50 * 3 * 3 - kept}


def fewest_misses(requests: list[tuple[int, ...]], slots: int) -> int:
    """By trying everything: after each request the cache holds all of it, and any of what it held before."""

    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(requests):
            return 0
        asked = frozenset(requests[at])
        room = min(slots - len(asked), len(held - asked))
        rest = min(best(at + 1, asked | frozenset(kept)) for kept in itertools.combinations(sorted(held - asked), room))
        return len(asked - held) + rest

    return best(0, frozenset())


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True), min_size=1, max_size=9),
    slots=st.integers(2, 4),
)
def test_belady_is_the_best_there_is(requests: list[list[int]], slots: int) -> None:
    trace = written_trace([[row] for row in requests], experts=6)
    results = {policy: simulate(trace, Setting(policy, slots)).misses for policy in SIMULATED}
    assert results["belady"] == fewest_misses([tuple(row) for row in requests], slots) == min(results.values())


@pytest.mark.parametrize("cold", [True, False])
def test_belady_bounds_every_policy(cold: bool) -> None:
    trace = random_trace([(12, 30), (5, 30)], layers=3, experts=12, top_k=3, prefill_chunk=4)
    for slots in ({"slots_per_layer": 5}, {"shared_slots": 15}):
        results = [simulate(trace, Setting(policy, **slots, cold=cold)) for policy in SIMULATED]
        misses = [int(result.misses + result.prompt_misses.sum()) for result in results]
        assert misses[-1] == min(misses) < max(misses)


CASES = {"lru": "LRU", "lfu": "LFU", "fifo": "FIFO", "belady": "Belady"}


@pytest.mark.parametrize("policy", CASES)
def test_libcachesim_counts_the_same(policy: str, tmp_path: Path) -> None:
    """One expert per token: the only case in which a request is one object, as it is there."""
    libcachesim = pytest.importorskip("libcachesim", exc_type=ImportError)  # its wheel wants the system's glib
    trace = random_trace([(0, 400)], layers=1, experts=24, top_k=1)
    ids = trace.experts[:, 0, 0].tolist()
    for slots in (2, 5, 12):
        cache = getattr(libcachesim, CASES[policy])(cache_size=slots)
        hits = [cache.get(request) for request in libcachesim_requests(libcachesim, ids)]
        assert [not hit for hit in hits] == simulate(trace, Setting(policy, slots)).missed[:, 0].astype(bool).tolist()


def libcachesim_requests(library: Any, ids: list[int]) -> Iterator[Any]:
    """Requests of size 1 that know when their object is asked for again, which Belady needs."""
    coming: dict[int, int] = {}
    after = []
    for at in range(len(ids) - 1, -1, -1):
        after.append(coming.get(ids[at], (1 << 63) - 1))
        coming[ids[at]] = at
    for at, (key, later) in enumerate(zip(ids, reversed(after), strict=True)):
        request = library.Request()
        request.obj_id, request.obj_size, request.clock_time, request.next_access_vtime = key, 1, at, later
        yield request


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        (Setting("opt", 3), UsageError, r"unknown policy 'opt' \(known: lru, lfu, lfru, fifo, gate, belady\)"),
        (Setting("lru", 1), BudgetError, "1 slots per layer cannot hold the top 2 experts"),
        (Setting("lru", shared_slots=3), BudgetError, r"one token cycle of 4 experts \(2 layers x top 2\): --slots 4"),
        (Setting("lru"), UsageError, "either slots per layer or slots that all layers share"),
        (Setting("lru", 3, 9), UsageError, "either slots per layer or slots that all layers share"),
        (Setting("belady", 3, prior=CachePrior()), UsageError, "belady needs to know"),
        (Setting("lru", 3, prior=CachePrior(-1.0)), UsageError, "--prior-strength -1.0"),
        (Setting("lru", 3, prior=CachePrior(top_j=3)), UsageError, "--prior-top-j 3: expected 0 to 2"),
        (Setting("lru", 3, prompt="half"), UsageError, "unknown prompt 'half'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_are_refused(setting: Setting, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        simulate(random_trace([(2, 3)]), setting)


def test_a_trace_without_what_is_needed_is_refused() -> None:
    plain = dataclasses.replace(written_trace([[[0]]], 2), logits=None)
    for setting in (Setting("lru", 1, prior=CachePrior()), Setting("gate", 1)):
        with pytest.raises(UsageError, match="record it with `edge trace --logits`"):
            simulate(plain, setting)
    with pytest.raises(UsageError, match="prompts only"):
        simulate(random_trace([(3, 0)]), Setting("lru", 3))
