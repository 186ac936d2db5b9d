"""Rope tables against angles derived by hand; heads of which only a part turns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from export.families import parse_config
from runtime.config import RopeConfig
from runtime.errors import BundleError
from runtime.rope import RopeTable, inverse_frequencies, rotate
from tests import published_configs as published

YARN = RopeConfig(8, 10000.0, "yarn", 4.0, 64, attention_factor=1.25)


def test_frequencies() -> None:
    assert inverse_frequencies(RopeConfig(4, 100.0)).tolist() == pytest.approx([1, 0.1])
    assert inverse_frequencies(RopeConfig(4, 100.0, "linear", 4.0)).tolist() == pytest.approx([0.25, 0.025])
    # Two of four pairs turn, with the angles of a head of 4 values.
    assert inverse_frequencies(RopeConfig(8, 100.0, turning=4)).tolist() == pytest.approx([1, 0.1, 0, 0])


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    """A pair turns 64 theta^(-2i/8) / 2 pi times in 64 tokens: 10.2, 1.02, 0.102 and 0.0102. The ramp's ends lie at
    8 ln(64 / (2 pi n)) / (2 ln 10^4) = -0.50 for n = 32 and 1.008 for n = 1, so at 0 and 2 when rounded outwards.
    """
    assert inverse_frequencies(YARN).tolist() == pytest.approx([1, (0.1 + 0.025) / 2, 0.01 / 4, 0.001 / 4])
    part = inverse_frequencies(replace(YARN, dim=20, turning=8))
    assert part.tolist() == [*inverse_frequencies(YARN).tolist(), *[0.0] * 6]


def test_what_passes_is_not_scaled_by_the_attention_factor() -> None:
    cos, sin = RopeTable(replace(YARN, dim=12, turning=8)).rows(1, 2)
    assert cos.shape == sin.shape == (2, 12)
    for passing in ([4, 5], [10, 11]):
        assert cos[:, passing].tolist() == [[1.0, 1.0]] * 2
        assert sin[:, passing].tolist() == [[0.0, 0.0]] * 2
    assert cos[:, 0].tolist() == cos[:, 6].tolist() == pytest.approx([1.25 * math.cos(1), 1.25 * math.cos(2)])
    assert sin[1].tolist()[6:8] == pytest.approx([1.25 * math.sin(2), 1.25 * math.sin(0.125)])


def test_a_head_of_which_half_turns() -> None:
    """Values a, b turn and p, q pass: stored as a, p, b, q they are pairs (a, b) and (p, q)."""
    cos, sin = RopeTable(RopeConfig(4, 10000.0, turning=2)).rows(3, 1)
    a, p, b, q = 2.0, 7.0, 5.0, 11.0
    expected = [a * math.cos(3) - b * math.sin(3), p, b * math.cos(3) + a * math.sin(3), q]
    assert rotate(torch.tensor([[[a, p, b, q]]]), cos, sin).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("turning", [0, -2, 3, 130])
def test_an_impossible_number_of_turning_values_is_refused(turning: int) -> None:
    config = parse_config(published.GLM_4_5_AIR)
    with pytest.raises(BundleError, match=r"rope\.turning"):
        replace(config, rope=replace(config.rope, turning=turning)).check()
