"""Routing statistics on traces that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from remoe.metrics import (
    distinct_experts,
    expert_loads,
    expert_overlap,
    load_cv,
    load_entropy,
    locality,
    segment_cache,
    segment_routing,
)
from remoe.windows import windows
from runtime.errors import UsageError
from tests.traces import random_trace, written_trace


def test_overlap_counts_pairs_within_a_request() -> None:
    rows = [[[0, 1]], [[1, 2]], [[3, 4]], [[3, 4]]]
    assert expert_overlap(written_trace(rows, 5)) == pytest.approx((1 + 0 + 2) / 6)
    assert expert_overlap(written_trace(rows, 5, requests=[0, 0, 1, 1])) == pytest.approx((1 + 2) / 4)
    assert expert_overlap(written_trace(rows[:1], 5)) is None


def test_prompts_do_not_count() -> None:
    trace = random_trace([(6, 5)])
    steps = trace.experts[6:].tolist()
    same = [
        len(set(a) & set(b))
        for now, before in zip(steps[1:], steps, strict=False)
        for a, b in zip(now, before, strict=True)
    ]
    assert expert_overlap(trace) == pytest.approx(sum(same) / (4 * 2 * 2))
    assert expert_loads(trace).sum() == 5 * 2 * 2


def test_load_is_even_or_not() -> None:
    even, uneven = np.array([[5, 5, 5, 5]]), np.array([[20, 0, 0, 0]])
    assert (load_cv(even), load_entropy(even)) == (0.0, pytest.approx(1.0))
    assert (load_cv(uneven), load_entropy(uneven)) == (pytest.approx(math.sqrt(3)), 0.0)
    half = np.array([[2, 2, 0, 0], [5, 5, 5, 5]])
    assert load_entropy(half) == pytest.approx((math.log(2) / math.log(4) + 1) / 2)
    assert load_cv(half) == pytest.approx(0.5)


def test_distinct_experts_per_request_and_layer() -> None:
    trace = written_trace([[[0], [0]], [[1], [0]], [[1], [2]]], 3, requests=[0, 0, 1])
    assert distinct_experts(trace) == pytest.approx((2 + 1 + 1 + 1) / 4)


def test_segments_by_hand() -> None:
    """Segments of two tokens: {0,1},{0,2} counts 2,1,1; {0,2},{3,2} counts 1,2,1 (experts 0 2 3)."""
    trace = written_trace([[[0, 1]], [[0, 2]], [[3, 2]]], 4)
    # At least 2 uses: sets of one expert, 2 uses of 2: precision 4/4, recall 4/8, F1 2/3.
    # At least 1 use: sets of three, all 4 uses of 6: precision 8/12, recall 1, F1 4/5.
    assert segment_routing(trace, 2) == pytest.approx(4 / 5)
    assert segment_cache(trace, 2, 1) == pytest.approx(4 / 8)
    assert segment_cache(trace, 2, 2) == pytest.approx(6 / 8)
    assert segment_cache(trace, 2, 4) == 1.0
    assert segment_routing(trace, 4) is None
    assert segment_cache(trace, 4, 1) is None


def test_one_expert_for_all_is_the_most_local() -> None:
    found = locality(written_trace([[[0, 1]]] * 20, 4), slots=2)
    assert (found.overlap, found.srp, found.sch, found.distinct_experts) == (1.0, 1.0, 1.0, 2.0)


def test_windows_do_not_cross_documents() -> None:
    assert windows([[1, 2, 3, 4, 5], [6, 7]], 3) == [[1, 2, 3], [4, 5], [6, 7]]
    assert windows([[1, 2, 3, 4], [6, 7]], 3) == [[1, 2, 3], [6, 7]]  # the lone 4 predicts nothing
    assert windows([[1, 2, 3, 4, 5], [6, 7]], 3, limit=5) == [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[]], 8), "the text is empty or a single token"),
        (([[1]], 8), "the text is empty or a single token"),
        (([[1, 2]], 1), "--window 1: expected at least 2"),
        (([[1, 2]], 8, 1), "--tokens 1: expected at least 2"),
    ],
)
def test_nothing_to_read_is_said(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        windows(*arguments)  # type: ignore[arg-type]
