"""Joules from samples of power: the current value integrated over a window by trapezoids. The average column of a tool,
a mean since the tool was started, says nothing about a window and is never looked at.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from profiles.telemetry.source import Sample

SENSOR_UPDATE_NS = 430_000_000  # how often the power sensors of a Jetson change their value
SHORT_WINDOW_NS = 3 * SENSOR_UPDATE_NS
MAX_GAP_NS = 2_000_000_000  # a longer silence is not bridged by a straight line

WHOLE_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")  # rails that carry everything behind them


@dataclass(frozen=True)
class Energy:
    """`joules` is None, with the reason in `why`, where the samples do not cover the window.

    `short`: the window is shorter than three updates of the sensor, so the value hangs on one or two readings.
    """

    joules: float | None
    short: bool
    samples: int
    why: str = ""


def board_rails(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The rails that add up to the board: one that carries all, or else every rail there is (packages on a host)."""
    seen = dict.fromkeys(rail for sample in samples for rail in sample.reading.power_mw)
    whole = [rail for rail in WHOLE_RAILS if rail in seen]
    return (whole[0],) if whole else tuple(seen)


def energy(samples: Sequence[Sample], rails: Sequence[str], begin_ns: int, end_ns: int) -> Energy:
    """Joules of `rails` together from `begin_ns` to `end_ns` (CLOCK_MONOTONIC). `samples` are in order of time.

    Between two samples power is a straight line; nothing is guessed before the first and after the last one.
    """
    short = end_ns - begin_ns < SHORT_WINDOW_NS
    # From the last sample at or before the window to the first at or after it.
    first = max(0, bisect_right(samples, begin_ns, key=_time_ns) - 1)
    last = bisect_left(samples, end_ns, key=_time_ns) + 1
    points = [(s.time_ns, power) for s in samples[first:last] if (power := _power_mw(s, rails)) is not None]
    inside = sum(begin_ns <= time_ns <= end_ns for time_ns, _ in points)
    if not points:
        return Energy(None, short, 0, "no power was measured")
    if points[0][0] > begin_ns or points[-1][0] < end_ns:
        return Energy(None, short, inside, "the samples do not cover the window")
    total = 0.0
    for (left_ns, left), (right_ns, right) in itertools.pairwise(points):
        low, high = max(left_ns, begin_ns), min(right_ns, end_ns)
        if low >= high:
            continue
        if right_ns - left_ns > MAX_GAP_NS:
            return Energy(None, short, inside, f"no sample for {(right_ns - left_ns) / 1e9:.1f} s")
        slope = (right - left) / (right_ns - left_ns)
        middle = left + slope * ((low + high) / 2 - left_ns)
        total += middle * (high - low)
    return Energy(total / 1e12, short, inside)  # mW x ns = 1e-12 J


def _time_ns(sample: Sample) -> int:
    return sample.time_ns


def _power_mw(sample: Sample, rails: Sequence[str]) -> float | None:
    """Sum of the rails; None unless all are there."""
    power = sample.reading.power_mw
    if not rails or any(rail not in power for rail in rails):
        return None
    return sum(power[rail].current for rail in rails)
