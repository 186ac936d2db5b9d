"""From the runs of a calibration to the figures of a device profile (profiles/device.py).

The parts of a token that misses nothing are sums of unknown times, counted by what the model has of each:

    dense   = head + layers x (block + shared) + dense bytes / rate
    experts = layers x (mixing + top-k x (expert + expert bytes / rate))
    other   = token + layers x asking the cache

Two models with different top-k tell the price of an expert from that of a layer, two with different sizes that of a
byte from that of an expert. Least squares over all models, each part relative to its own length. What reads cost is
what tokens that miss take longer, less the waiting that the drive's rate explains.

Times are lower quartiles over tokens: what else runs on a machine only ever makes a step longer, in bursts that meet
one model and spare the next. Rates of the drive are medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from profiles.calibration import Rates, Runs
from profiles.costs import device_costs, layer_times
from profiles.device import Device, Figure, Overheads, Streaming
from runtime.errors import EdgeError
from runtime.records import TokenRecord

Array = np.ndarray[Any, np.dtype[np.float64]]
MakeFigure = Callable[[float, str], Figure]
_MB = 1e6  # keeps the columns of the least squares alike
_MOST_SHARE = 2.0
_QUARTILE = 0.25


@dataclass(frozen=True)
class Host:
    """What a profile says of a machine before anything is measured; `system_bytes` of `ram_bytes` are taken."""

    name: str
    title: str
    ram_bytes: int
    system_bytes: int


@dataclass(frozen=True)
class StepCosts:
    """Seconds of the steps of a token beside moving its bytes, which go at `bytes_per_s`."""

    token_s: float
    block_s: float
    routing_s: float
    expert_s: float
    bytes_per_s: float


def calibrated(host: Host, rates: Rates, runs: dict[str, Runs], figure: MakeFigure) -> Device:
    """The profile whose memory rate, read curve and overheads explain the runs. Raises EdgeError when they make no
    sense together.
    """
    steps = step_costs(list(runs.values()))
    device = Device(
        name=host.name,
        title=host.title,
        ram_bytes=figure(host.ram_bytes, "the memory that the kernel tells"),
        system_bytes=figure(host.system_bytes, "what was not available then"),
        memory_read_bytes_per_s=figure(steps.bytes_per_s, "weights of decoding engines, all resident"),
        storage=rates.storage(figure),
        reads=rates.curve(figure),
        overheads=Overheads(
            token_s=figure(steps.token_s, "other_ms of models with more and fewer layers"),
            block_s=figure(steps.block_s, "dense_ms of all models, less their bytes"),
            routing_s=figure(steps.routing_s, "routing_ms, asking the cache, and putting outputs together"),
            expert_s=figure(steps.expert_s, "expert_ms of models with more, fewer and larger experts"),
        ),
    )
    missing = sorted((found for found in runs.values() if found.missing), key=lambda found: found.sizes.blob_bytes)
    return replace(device, streaming=tuple(_streaming(device, found, figure) for found in missing))


def step_costs(models: Sequence[Runs]) -> StepCosts:
    """Of tokens that miss nothing. Raises EdgeError when bytes seem to cost nothing."""
    rows: list[list[float]] = []
    times: list[float] = []
    for runs in models:
        s = runs.sizes
        dense_bytes = s.head_bytes + s.layers * (s.dense_layer_bytes + s.shared_bytes)
        experts = s.layers * s.top_k
        shared = s.layers if s.shared_bytes else 0
        rows += [[s.blocks, 0, shared, dense_bytes / _MB], [0, s.layers, experts, experts * s.expert_bytes / _MB]]
        times += [_part(runs, "dense_ms"), _part(runs, "expert_ms")]
    block, mixing, expert, per_mb = map(float, _least_squares(rows, times))
    if per_mb <= 0:
        raise EdgeError("the large calibration model took no longer than the small ones: run it again, with less else")
    rows, times = [[1, runs.sizes.layers] for runs in models], [_part(runs, "other_ms") for runs in models]
    token, asking = map(float, _least_squares(rows, times))
    routing = statistics.median(_part(runs, "routing_ms") / runs.sizes.layers for runs in models)
    return StepCosts(token, block, routing + asking + mixing, expert, _MB / per_mb)


def _streaming(device: Device, runs: Runs, figure: MakeFigure) -> Streaming:
    """Of one model's runs with smaller caches."""
    size = runs.sizes.blob_bytes
    share = figure(_read_share(device, runs), "the engine's reads against raw ones")
    known = replace(device, streaming=(Streaming(size, share, figure(0, "not known yet"), figure(0, "not known yet")),))
    reading, miss = _handling(known, runs)
    how = "what tokens that miss take longer, less waiting for the drive"
    return Streaming(size, share, figure(reading, f"{how}: per layer"), figure(miss, f"{how}: per expert"))


def _read_share(device: Device, runs: Runs) -> float:
    """The drive's own time over the time in which the engine had reads on their way."""
    costs, shares = device_costs(runs.sizes, device), []
    for record in _all(runs.missing):
        misses = np.array([m for m in record.misses if m], dtype=np.float64)
        if len(misses) and record.read_busy_ms:
            shares.append(float(costs.read_s(misses).sum()) / (record.read_busy_ms / 1000))
    return min(_MOST_SHARE, statistics.median(shares)) if shares else 1.0


def _handling(device: Device, runs: Runs) -> tuple[float, float]:
    """Seconds per layer that misses, and per miss, from each cache size."""
    costs = device_costs(runs.sizes, device)
    usual = _undisturbed(record.total_ms for record in whole(runs.resident)) / 1000
    rows, times = [], []
    for records in runs.missing:
        longer = []
        for record in records:
            explained = float(layer_times(costs, runs.sizes.top_k, np.array(record.misses, float)).waiting_s.sum())
            longer.append(record.total_ms / 1000 - usual - min(record.wait_ms / 1000, explained))
        rows.append([_mean(sum(m > 0 for m in r.misses) for r in records), _mean(sum(r.misses) for r in records)])
        times.append(max(0.0, _undisturbed(longer)))
    reading, miss = map(float, _least_squares(rows, times))
    return reading, miss


def whole(records: Sequence[TokenRecord]) -> list[TokenRecord]:
    """Those that missed nothing. Raises EdgeError without any."""
    found = [record for record in records if not sum(record.misses)]
    if not found:
        raise EdgeError("every token of a calibration run missed an expert: this is a defect, please report it")
    return found


def _part(runs: Runs, part: str) -> float:
    """Seconds of a part of the tokens that missed nothing."""
    return _undisturbed(getattr(record, part) for record in whole(runs.resident)) / 1000


def _least_squares(rows: Sequence[Sequence[float]], times: Sequence[float]) -> Array:
    """Unknowns of rows . unknowns = times, none below zero, with the errors relative to the times.

    One that would come out below zero is left out (zero), the most negative first.
    """
    weights = 1 / np.maximum(np.array(times, dtype=np.float64), 1e-9)
    matrix, wanted = np.array(rows, dtype=np.float64) * weights[:, None], np.array(times) * weights
    left = list(range(matrix.shape[1]))
    found = np.zeros(matrix.shape[1])
    while left:
        some = np.linalg.lstsq(matrix[:, left], wanted, rcond=None)[0]
        if some.min() >= 0:
            found[left] = some
            break
        del left[int(some.argmin())]
    return found


def _all(runs: Iterable[Sequence[TokenRecord]]) -> list[TokenRecord]:
    return [record for records in runs for record in records]


def _undisturbed(times: Iterable[float]) -> float:
    return float(np.quantile(list(times), _QUARTILE))


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
