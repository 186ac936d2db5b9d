"""Joules, by hand: trapezoids of the current value, marks for short windows, null where nothing was measured."""

from __future__ import annotations

import pytest

from profiles.telemetry.energy import board_rails, energy
from profiles.telemetry.reading import Power, Reading
from profiles.telemetry.source import Sample

MS = 1_000_000


def samples_of(*points: tuple[int, float], average: float = 1e9) -> list[Sample]:
    """(milliseconds, milliwatts) of VDD_IN; the average column is absurd on purpose."""
    return [Sample(t * MS, Reading(power_mw={"VDD_IN": Power(p, average, average)})) for t, p in points]


RAMP = samples_of((0, 4000), (1000, 4000), (2000, 8000), (3000, 2000))


@pytest.mark.parametrize(
    ("begin_ms", "end_ms", "joules", "short"),
    [
        (0, 3000, 4 + 6 + 5, False),  # 4 W x 1 s, (4 + 8) / 2 x 1 s, (8 + 2) / 2 x 1 s
        (500, 2500, 2 + 6 + 3.25, False),  # half of the first; 8 W falling to 5 W over the last half second
        (1250, 1750, 3.0, True),  # 5 W to 7 W over half a second
        (1000, 2290, 6 + 0.29 * (8 + 6.26) / 2, False),  # exactly three updates: 1290 ms
        (1000, 2289, 6 + 0.289 * (8 + 6.266) / 2, True),
        (700, 700, 0.0, True),
    ],
)
def test_energy_is_the_trapezoid_of_the_current_value(begin_ms: int, end_ms: int, joules: float, short: bool) -> None:
    found = energy(RAMP, ["VDD_IN"], begin_ms * MS, end_ms * MS)
    assert found.joules == pytest.approx(joules, rel=1e-12)
    assert found.short is short
    assert found.samples == sum(begin_ms <= t <= end_ms for t in (0, 1000, 2000, 3000))


def test_energy_is_null_where_it_was_not_measured() -> None:
    assert energy([], ["VDD_IN"], 0, MS).why == "no power was measured"
    assert energy(RAMP, [], 0, MS).joules is None
    assert energy(RAMP, ["VDD_IN", "OTHER"], 0, MS).why == "no power was measured"
    for begin, end in ((-1, 2000), (0, 3001)):
        found = energy(RAMP, ["VDD_IN"], begin * MS, end * MS)
        assert (found.joules, found.why) == (None, "the samples do not cover the window")
    silent = samples_of((0, 4000), (1000, 4000), (3001, 4000))
    assert energy(silent, ["VDD_IN"], 0, 3000 * MS).why == "no sample for 2.0 s"
    assert energy(silent, ["VDD_IN"], 0, 1000 * MS).joules == pytest.approx(4.0)


def test_which_rails_make_the_board() -> None:
    def rails(*names: str) -> tuple[str, ...]:
        return board_rails([Sample(0, Reading(power_mw={name: Power(1) for name in names}))])

    assert rails("VDD_CPU_GPU_CV", "VDD_IN", "VDD_SOC") == ("VDD_IN",)
    assert rails("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0") == ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
    assert rails("VDD_GPU", "VIN_SYS_5V0", "VIN") == ("VIN",)
    assert rails() == ()
    two = [Sample(t * MS, Reading(power_mw={"A": Power(1000), "B": Power(500)})) for t in (0, 2000)]
    assert energy(two, ["A", "B"], 0, 2000 * MS).joules == pytest.approx(3.0)
