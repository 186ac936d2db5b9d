"""The sampler against transformers' logits processors and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import EdgeError, UsageError
from runtime.sampler import Sampler, SamplingOptions


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([math.log(p) for p in probabilities])


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    sampler = Sampler(SamplingOptions())
    assert sampler.choose(torch.tensor([0.0, 2.0, 1.0, 2.0]), []) == 1


@pytest.mark.parametrize(
    ("options", "ids", "expected"),
    [
        (SamplingOptions(temperature=1), [0, 1, 2, 3], [0.4, 0.3, 0.2, 0.1]),
        # Temperature 0.5 squares the odds: 16 : 9 : 4 : 1 of 30.
        (SamplingOptions(temperature=0.5), [0, 1, 2, 3], [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (SamplingOptions(temperature=1, top_k=2), [0, 1], [4 / 7, 3 / 7]),
        # 0.4 alone stays below 0.5, 0.4 + 0.3 reaches it.
        (SamplingOptions(temperature=1, top_p=0.5), [0, 1], [4 / 7, 3 / 7]),
        (SamplingOptions(temperature=1, top_p=0.01), [0], [1.0]),
        # Top-p looks at what top-k left: 0.4/0.7 = 0.57 reaches 0.5 alone.
        (SamplingOptions(temperature=1, top_k=2, top_p=0.5), [0], [1.0]),
    ],
)
def test_distribution_by_hand(options: SamplingOptions, ids: list[int], expected: list[float]) -> None:
    found_ids, probabilities = Sampler(options).distribution(logits_of(0.4, 0.3, 0.2, 0.1), [])
    assert found_ids.tolist() == ids
    torch.testing.assert_close(probabilities, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    logits = torch.tensor([3.0, -1.0, 2.0, 0.5])
    sampler = Sampler(SamplingOptions(repetition_penalty=2.0))
    assert sampler.choose(logits, [0, 0, 1]) == 2  # 3 / 2 = 1.5, not 0.75: once although seen twice; 2 is untouched
    assert sampler.choose(logits, [0, 2]) == 0  # 1.5 against 1.0
    assert sampler.choose(torch.tensor([-1.0, -1.5]), [0]) == 1  # -1 becomes -2
    assert logits.tolist() == [3.0, -1.0, 2.0, 0.5]  # the caller's tensor is not changed


def transformers_distribution(logits: torch.Tensor, history: list[int], options: SamplingOptions) -> torch.Tensor:
    from transformers import generation

    steps: list[object] = [generation.TemperatureLogitsWarper(options.temperature)]
    if options.repetition_penalty != 1:
        steps.insert(0, generation.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.top_k:
        steps.append(generation.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        steps.append(generation.TopPLogitsWarper(options.top_p))
    scores = logits[None].clone()
    for step in steps:
        scores = step(torch.tensor([history]), scores)  # type: ignore[operator]
    return scores.softmax(-1)[0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([5, 300, 3000]),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 4, 50, 2000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3]),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
)
def test_distribution_equals_transformers(
    seed: int, vocabulary: int, spread: float, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocabulary, generator=random) * spread
    history = torch.randint(0, vocabulary, (6,), generator=random).tolist()
    options = SamplingOptions(temperature, top_k, top_p, penalty)
    expected = transformers_distribution(logits, history, options)
    ids, probabilities = Sampler(options).distribution(logits, history)
    found = torch.zeros(vocabulary).scatter(0, ids, probabilities.float())
    # Both cut where a running sum passes top_p; rounding may put one token at the edge on either side.
    # (And fp32 underflows where our fp64 does not: that is no difference.)
    differing = (((found > 0) != (expected > 0)) & (torch.maximum(found, expected) > 1e-12)).nonzero().flatten()
    assert len(differing) <= (1 if top_p < 1 else 0)
    tolerance = 1e-5 + sum(float(max(found[i], expected[i])) for i in differing)
    assert float((found - expected).abs().max()) <= tolerance


def test_top_p_beyond_the_quick_selection_is_exact() -> None:
    """4000 equal tokens: half of the mass needs 2000 of them, more than the first selection looks at."""
    ids, _ = Sampler(SamplingOptions(temperature=1, top_p=0.5)).distribution(torch.zeros(4000), [])
    assert len(ids) == pytest.approx(2000, abs=1)


def test_equal_logits_at_the_edge_of_top_k_are_taken_by_id() -> None:
    ids, _ = Sampler(SamplingOptions(temperature=1, top_k=3)).distribution(torch.zeros(50), [])
    assert ids.tolist() == [0, 1, 2]


def test_equal_seeds_draw_equal_tokens_and_leave_torch_alone() -> None:
    logits = torch.zeros(1000)
    draws = []
    for _ in range(2):
        sampler = Sampler(SamplingOptions(temperature=1, seed=7))
        torch.rand(3)  # somebody else draws in between
        draws.append([sampler.choose(logits, []) for _ in range(20)])
    other = Sampler(SamplingOptions(temperature=1, seed=8))
    assert draws[0] == draws[1]
    assert draws[0] != [other.choose(logits, []) for _ in range(20)]


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(SamplingOptions(temperature=1, seed=1))
    logits = logits_of(0.5, 0.3, 0.2)
    counts = torch.bincount(torch.tensor([sampler.choose(logits, []) for _ in range(4000)]), minlength=3)
    # Standard deviation of a share is at most sqrt(0.25 / 4000) = 0.008; the seed is fixed.
    torch.testing.assert_close(counts / 4000, torch.tensor([0.5, 0.3, 0.2]), atol=0.032, rtol=0)


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    sampler = Sampler(SamplingOptions(temperature=1))
    assert {sampler.choose(logits, []) for _ in range(200)} == {0, 2}


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    sampler = Sampler(SamplingOptions(temperature=1e-40))
    assert sampler.choose(torch.tensor([1e4, -1e4, 9.9e3]), []) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_stop_the_run(bad: float, temperature: float) -> None:
    with pytest.raises(EdgeError, match="left the range of the compute dtype"):
        Sampler(SamplingOptions(temperature=temperature)).choose(torch.tensor([0.0, bad, 1.0]), [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"seed": -1},
        {"seed": 1 << 63},
        {"seed": True},
    ],
)
def test_wrong_options_are_refused_by_name(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=rf"^{name} is .*must be"):
        SamplingOptions(**wrong)  # type: ignore[arg-type]
