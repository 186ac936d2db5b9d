"""Synthetic traces have the overlap that was asked for, an even load, and chains of the right law."""

from __future__ import annotations

import itertools
from collections import Counter
from math import comb
from pathlib import Path

import numpy as np
import pytest

from remoe.metrics import expert_loads, expert_overlap, load_cv
from remoe.simulate import Setting, simulate
from remoe.synthetic import SyntheticRouting, synthetic_trace
from remoe.trace import Trace
from runtime.config import AttentionConfig, ModelConfig, RopeConfig, RouterConfig
from runtime.errors import UsageError


def config(experts: int = 60, top_k: int = 4, layers: int = 3, choice_bias: bool = False) -> ModelConfig:
    return ModelConfig(
        family="test",
        vocab_size=100,
        hidden_size=8,
        num_layers=layers + 1,
        max_context=64,
        norm_eps=1e-6,
        activation="silu",
        attention=AttentionConfig("gqa", 2, 1, 4, 4, 4, 0.5),
        rope=RopeConfig(4, 1e4),
        router=RouterConfig(experts, top_k, choice_bias=choice_bias),
        moe_layers=tuple(range(1, layers + 1)),
        expert_intermediate_size=6,
    )


@pytest.mark.parametrize("overlap", [0.05, 0.1695, 0.2156, 0.5, 0.97])
@pytest.mark.parametrize("lengths", [((0, 4096),), ((16, 64),) * 64])
def test_overlap_is_the_wanted_one_in_every_layer(overlap: float, lengths: tuple[tuple[int, int], ...]) -> None:
    """4,096 decode steps: within 1 % in a single layer, where independent draws would be off by 2 % (one sigma)."""
    trace = synthetic_trace(config(layers=1), SyntheticRouting(overlap, lengths))
    assert int(trace.decode.sum()) == 4096
    assert expert_overlap(trace) == pytest.approx(overlap, rel=0.01)


def test_steps_are_binomial_and_experts_even() -> None:
    """Top 3 of 8, overlap 0.4: n experts stay with probability C(3, n) 0.4^n 0.6^(3 - n); each expert has 3 in 8."""
    trace = synthetic_trace(config(8, 3, layers=2), SyntheticRouting(0.4, ((0, 8001),)))
    for layer in range(2):
        sets = [set(row) for row in trace.experts[:, layer].tolist()]
        stay = Counter(len(a & b) for a, b in itertools.pairwise(sets))
        for n in range(4):
            assert stay[n] / 8000 == pytest.approx(comb(3, n) * 0.4**n * 0.6 ** (3 - n), abs=1e-3)
    share = expert_loads(trace) / 8001
    assert np.abs(share - 3 / 8).max() < 0.03
    assert load_cv(expert_loads(trace)) < 0.05


def test_a_cache_of_k_slots_misses_what_does_not_stay() -> None:
    """C = K under LRU holds exactly the last set: hit rate = overlap, but for the cold first step of each request."""
    trace = synthetic_trace(config(), SyntheticRouting(0.25, ((1, 40),) * 8))
    result = simulate(trace, Setting("lru", 4))
    first = np.flatnonzero(trace.positions == 1)
    misses = np.delete(result.missed[trace.decode == 1], (first - np.arange(8) - 1).tolist(), axis=0)
    assert 1 - misses.mean() / 4 == pytest.approx(0.25, rel=0.01)


def test_crowded_models_must_keep_some() -> None:
    """Top 6 of 8: at least 4 of 6 stay, whatever is wanted."""
    trace = synthetic_trace(config(8, 6), SyntheticRouting(0.75, ((0, 2000),)))
    assert expert_overlap(trace) == pytest.approx(0.75, rel=0.01)
    everyone = synthetic_trace(config(4, 4), SyntheticRouting(1.0, ((0, 5),)))
    assert expert_overlap(everyone) == 1.0
    with pytest.raises(UsageError, match=r"an overlap of 0.6 cannot be: with the top 6 of 8 it is 0.666667 to 1"):
        synthetic_trace(config(8, 6), SyntheticRouting(0.6, ((0, 10),)))


@pytest.mark.parametrize("overlap", [-0.1, 1.01, float("nan"), float("inf")])
def test_refuses_an_overlap_that_cannot_be(overlap: float) -> None:
    with pytest.raises(UsageError, match="cannot be: with the top 4 of 60 it is 0 to 1"):
        synthetic_trace(config(), SyntheticRouting(overlap, ((0, 10),)))


@pytest.mark.parametrize("lengths", [(), ((0, 0),), ((-1, 5),)])
def test_refuses_requests_without_tokens(lengths: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(UsageError, match="requests with at least one token"):
        synthetic_trace(config(), SyntheticRouting(0.5, lengths))


def test_is_a_trace_like_any_other(tmp_path: Path) -> None:
    """Same options, same trace; another seed, another; saved and loaded unchanged; ids of 16 bits where needed."""
    options = SyntheticRouting(0.3, ((2, 3), (0, 4), (5, 0)), seed=1)
    trace = synthetic_trace(config(300, 4, choice_bias=True), options, expert_file_bytes=8192)
    trace.save(tmp_path / "a.trace.safetensors")
    again = Trace.load(tmp_path / "a.trace.safetensors")
    other = synthetic_trace(config(300, 4, choice_bias=True), options, expert_file_bytes=8192)
    for name in ("experts", "weights", "tokens", "requests", "positions", "decode", "choice_bias"):
        assert np.array_equal(getattr(trace, name), getattr(again, name))
        assert np.array_equal(getattr(trace, name), getattr(other, name))
    assert again.info == trace.info and trace.info.expert_bytes == 8192
    assert trace.requests.tolist() == [0] * 5 + [1] * 4 + [2] * 5
    assert trace.decode.tolist() == [0, 0, 1, 1, 1] + [1] * 4 + [0] * 5
    changed = synthetic_trace(config(300, 4), SyntheticRouting(0.3, options.lengths, seed=2))
    assert not np.array_equal(trace.experts, changed.experts)
    assert changed.info.expert_bytes == 4096  # 3 x 6 x 8 fp16 values, on a page
