"""What the time axis of a report shows of the samples: rows of lines, without those that were not measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

from profiles.rundir import Run
from profiles.telemetry.energy import board_rails
from profiles.telemetry.reading import Reading

Points = list[tuple[int, float]]  # CLOCK_MONOTONIC ns, value
Value = Callable[[Reading], float | None]


def telemetry_rows(run: Run) -> list[tuple[str, dict[str, Points]]]:
    """(axis label, {line: points}) from the first request on."""
    wanted: list[tuple[str, dict[str, Value]]] = [
        ("power, W", {rail: partial(_watts, rail) for rail in board_rails(run.samples)}),
        ("hottest, °C", {"hottest zone": _hottest}),
        ("RAM used, GiB", {"RAM": lambda r: None if r.ram_used_mib is None else r.ram_used_mib / 1024}),
        ("load, %", {"CPU": _cpu_load, "GPU": lambda r: r.gr3d_percent, "memory controller": lambda r: r.emc_percent}),
        ("clock, MHz", {"CPU": _cpu_mhz, "GPU": lambda r: max(r.gr3d_mhz, default=None)}),
    ]
    rows = [(label, {name: _points(run, value) for name, value in lines.items()}) for label, lines in wanted]
    kept = [(label, {name: points for name, points in lines.items() if points}) for label, lines in rows]
    return [(label, lines) for label, lines in kept if lines]


def _points(run: Run, value: Value) -> Points:
    begin = run.requests[0].start_ns
    found = ((sample.time_ns, value(sample.reading)) for sample in run.samples if sample.time_ns >= begin)
    return [(time_ns, number) for time_ns, number in found if number is not None]


def _watts(rail: str, reading: Reading) -> float | None:
    return reading.power_mw[rail].current / 1000 if rail in reading.power_mw else None


def _hottest(reading: Reading) -> float | None:
    return max((value for value in reading.temperatures_c.values() if value is not None), default=None)


def _cpu_load(reading: Reading) -> float | None:
    on = [load for load in reading.cpu_percent if load is not None]
    return statistics.fmean(on) if on else None


def _cpu_mhz(reading: Reading) -> float | None:
    return max((clock for clock in reading.cpu_mhz if clock is not None), default=None)
