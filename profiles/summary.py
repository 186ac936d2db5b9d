"""The figures of a run, from what it has written: the same whether it ended well or was cut off."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from profiles.rundir import Request, Run
from profiles.telemetry.energy import Energy, board_rails, energy
from profiles.telemetry.source import Sample
from runtime.records import TokenRecord, percentile

PARTS = ("dense_ms", "routing_ms", "wait_ms", "expert_ms", "other_ms")


def summarize(run: Run) -> dict[str, Any]:
    """What was not measured is None. TPOT, parts, hits and bytes are over decode, prefill is only in `ttft_ms`."""
    decode = [record for request in run.requests for record in request.decode]
    times = sorted(record.total_ms for record in decode)
    starts = sorted(request.records[0].total_ms for request in run.requests if request.records)
    hits, misses = (sum(sum(getattr(r, name)) for r in decode) for name in ("hits", "misses"))
    return {
        "requests": sum(request.complete for request in run.requests),
        "requests_wanted": run.header.get("requests"),
        "decode_tokens": len(decode),
        "ttft_ms": _spread(starts),
        "tpot_ms": _spread(times),
        "tokens_per_s": 1000 / statistics.fmean(times) if times else None,
        "parts_ms": {part: statistics.fmean(getattr(r, part) for r in decode) for part in PARTS} if decode else None,
        "hit_rate": hits / (hits + misses) if hits + misses else None,
        "hit_rate_per_layer": layer_hit_rates(decode),
        "misses_per_token": misses / len(decode) if decode else None,
        "bytes_per_token": sum(r.bytes for r in decode) / len(decode) if decode else None,
        "energy": energy_figures(run),
        "telemetry": telemetry_figures(run.samples),
    }


def layer_hit_rates(decode: Sequence[TokenRecord]) -> list[float | None]:
    """Share of experts found in the cache, per layer with experts."""
    if not decode:
        return []
    rates: list[float | None] = []
    for layer in range(len(decode[0].hits)):
        hits, misses = (sum(getattr(r, name)[layer] for r in decode) for name in ("hits", "misses"))
        rates.append(hits / (hits + misses) if hits + misses else None)
    return rates


def decode_energy(request: Request, samples: Sequence[Sample], rails: Sequence[str]) -> Energy:
    """Joules from the first token of an answer to its last."""
    if not request.decode:
        return Energy(None, True, 0, "no token was decoded")
    return energy(samples, rails, request.records[0].time_ns, request.records[-1].time_ns)


def energy_figures(run: Run) -> dict[str, Any]:
    """Joules per decoded token over the answers whose decode the samples cover, and of the whole run."""
    rails = board_rails(run.samples)
    windows = [(request, decode_energy(request, run.samples, rails)) for request in run.requests if request.decode]
    covered = [(request, found.joules) for request, found in windows if found.joules is not None]
    tokens = sum(len(request.decode) for request, _ in covered)
    whole = _whole(run, rails)
    return {
        "rails": list(rails),
        "joules_per_token": sum(joules for _, joules in covered) / tokens if tokens else None,
        "answers_covered": len(covered),
        "answers_short": sum(found.short for _, found in windows),  # shorter than three updates of the sensor
        "joules": whole.joules,
        "why_not": whole.why or None,
    }


def telemetry_figures(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Extremes over the run; a GPU or CPU clock that falls while the board is busy is what throttling looks like."""
    if not samples:
        return None
    readings = [sample.reading for sample in samples]
    zones = [value for r in readings for value in r.temperatures_c.values() if value is not None]
    rails = board_rails(samples)
    watts = [
        sum(r.power_mw[rail].current for rail in rails) / 1000 for r in readings if rails and rails[0] in r.power_mw
    ]
    return {
        "samples": len(samples),
        "seconds": (samples[-1].time_ns - samples[0].time_ns) / 1e9,
        "temperature_c": _range(zones),
        "power_w": _range(watts),
        "ram_used_mib": _range([r.ram_used_mib for r in readings if r.ram_used_mib is not None]),
        "gpu_mhz": _range([max(r.gr3d_mhz) for r in readings if r.gr3d_mhz]),
        "cpu_mhz": _range([max(on) for r in readings if (on := [c for c in r.cpu_mhz if c is not None])]),
    }


def _whole(run: Run, rails: Sequence[str]) -> Energy:
    ends = [request.records[-1].time_ns for request in run.requests if request.records]
    if not ends:
        return Energy(None, True, 0, "no token was made")
    return energy(run.samples, rails, run.requests[0].start_ns, ends[-1])


def _range(values: Sequence[float]) -> dict[str, float] | None:
    return {"min": min(values), "max": max(values)} if values else None


def _spread(ordered: list[float]) -> dict[str, float | None]:
    if not ordered:
        return {"median": None, "p95": None, "mean": None}
    return {
        "median": statistics.median(ordered),
        "p95": percentile(ordered, 95),
        "mean": statistics.fmean(ordered),
    }
