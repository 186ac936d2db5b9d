"""What to expect of a model on a board before anything is downloaded: does it fit, how often experts are read, how long
a token takes, what limits it, what would help.

The time is that of profiles/costs.py: a floor (no schedule of these parts is faster) unless the device profile holds
the overheads that `edge calibrate` measures. Without a trace the hit rate is an estimate:

    hit rate = r + (1 - r) (S - K) / (E - K)       S slots and E experts per layer, K per token

r is the overlap: the share of a token's experts that the token before had, too. LRU with S >= K keeps those; what else
is in the slots is taken for a uniform draw from the other experts. With a trace the cache is simulated instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from profiles.costs import Drive, device_costs, layer_times
from profiles.device import STREAMING, Device, Figure
from profiles.sizes import Sizes, model_sizes
from runtime.config import ModelConfig
from runtime.errors import UsageError
from runtime.memory import OVERHEAD_BYTES

PLAN_CONTEXT = 4096
# Overlap of stock routers as a multiple of what chance would give (K / E), from the ReMoE paper: Qwen1.5-MoE-A2.7B
# .1695 of 4/60, DeepSeek-V2-Lite .273 of 6/64. Tuning raised them by 27.2 % and 26.4 %.
CHANCE, USUAL, HIGH = 1.0, 0.1695 / (4 / 60), 0.273 / (6 / 64)
TUNED_GAIN = 0.264
_DRIVES: tuple[Drive, ...] = ("typical", "high", "low")
Array = np.ndarray[Any, np.dtype[Any]]
Misses = Callable[[int], Array]  # slots per layer to misses [N, L] of a trace's decode steps


@dataclass(frozen=True)
class Fit:
    """The memory sum of a board. `slots` per layer; fewer than top-k means that the model does not run."""

    usable_bytes: int
    expert_bytes: int
    slots: int
    runs: bool


@dataclass(frozen=True)
class Point:
    """One forecast: rates in bytes/s, `drive_ms` the part of `tpot_ms` that waits for the drive."""

    overlap: float | None  # None with a trace
    drive_bytes_per_s: float
    hit_rate: float
    misses_per_token: float
    read_bytes_per_token: float
    tpot_ms: float
    drive_ms: float

    @property
    def limit(self) -> str:
        """What most of the time is spent on."""
        return "the drive" if self.drive_ms > self.tpot_ms / 2 else "memory bandwidth"


@dataclass(frozen=True)
class Forecast:
    """`best` and `worst` bound the guesses about drive and overlap, not the engine."""

    fit: Fit
    usual: Point | None
    best: Point | None
    worst: Point | None
    helps: tuple[tuple[str, Point], ...] = ()


def fit(sizes: Sizes, device: Device) -> Fit:
    """Slots beside everything else."""
    context = device.cuda_context_bytes.value if device.cuda_context_bytes else 0.0
    usable = int(device.ram_bytes.value - device.system_bytes.value - context) - OVERHEAD_BYTES
    left = max(0, usable - sizes.resident_bytes - sizes.kv_bytes)
    slots = min(sizes.experts, left // (sizes.layers * sizes.blob_bytes))
    return Fit(usable, left, slots, slots >= sizes.top_k)


def hit_rate(sizes: Sizes, slots: int, overlap: float) -> float:
    """Share of a token's experts that are in the cache."""
    if slots >= sizes.experts:
        return 1.0
    return overlap + (1 - overlap) * (slots - sizes.top_k) / (sizes.experts - sizes.top_k)


def point(sizes: Sizes, device: Device, misses: Array, drive: Drive = "typical", overlap: float | None = None) -> Point:
    """A mean token whose layers miss so many experts: `misses` [..., layers or 1], fractions allowed.

    `overlap` is only passed on: what the misses were estimated from.
    """
    costs = device_costs(sizes, device, drive)
    times = layer_times(costs, sizes.top_k, np.asarray(misses, dtype=np.float64))
    per_token = float(sizes.layers * np.mean(misses))
    return Point(
        overlap=overlap,
        drive_bytes_per_s=getattr(device.storage, drive).value,
        hit_rate=1 - per_token / (sizes.layers * sizes.top_k),
        misses_per_token=per_token,
        read_bytes_per_token=per_token * sizes.blob_bytes,
        tpot_ms=1000 * (costs.token_s + sizes.layers * float(times.total_s.mean())),
        drive_ms=1000 * sizes.layers * float(times.waiting_s.mean()),
    )


def estimate(sizes: Sizes, device: Device, slots: int, overlap: float, drive: Drive = "typical") -> Point:
    """Without a trace: the hit rate from the overlap alone."""
    misses = sizes.top_k * (1 - hit_rate(sizes, slots, overlap))
    return point(sizes, device, np.array([misses]), drive, overlap)


def forecast(
    config: ModelConfig,
    device: Device,
    context: int | None = None,
    overlap: float | None = None,
    slots: int | None = None,
    trace_misses: Misses | None = None,
) -> Forecast:
    """`overlap` is a measured one; without it, from chance to what the published models have. `trace_misses` simulates
    a cache over a trace of this model instead. `slots` per layer are those that fit, unless they are given.

    Raises UsageError for values that cannot be.
    """
    sizes = model_sizes(config, min(PLAN_CONTEXT, config.max_context) if context is None else context)
    found = _fit(sizes, device, slots)
    if not found.runs:
        return Forecast(found, None, None, None)
    if overlap is not None and not 0 <= overlap <= 1:
        raise UsageError(f"--overlap {overlap}: a share of experts lies between 0 and 1")
    if trace_misses is not None:
        misses = trace_misses(found.slots)
        usual, best, worst = (point(sizes, device, misses, drive) for drive in _DRIVES)
    else:
        chance = sizes.top_k / sizes.experts
        overlaps = [min(1.0, overlap if overlap is not None else f * chance) for f in (USUAL, HIGH, CHANCE)]
        usual, best, worst = (
            estimate(sizes, device, found.slots, o, d) for o, d in zip(overlaps, _DRIVES, strict=True)
        )
    return Forecast(found, usual, best, worst, _helps(sizes, found.slots, usual, device, trace_misses))


def assumptions(device: Device) -> list[tuple[str, Figure]]:
    """The figures of the board that a forecast stands on."""
    context = [("CUDA context", device.cuda_context_bytes)] if device.cuda_context_bytes else []
    return [
        ("RAM", device.ram_bytes),
        ("system", device.system_bytes),
        *context,
        ("memory, reading", device.memory_read_bytes_per_s),
        ("drive, low", device.storage.low),
        ("drive, usual", device.storage.typical),
        ("drive, high", device.storage.high),
        *(vars(device.overheads).items() if device.overheads else []),
        *[(f"{name}, {s.blob_bytes / 1e6:.1f} MB", getattr(s, name)) for s in device.streaming for name in STREAMING],
    ]


def _fit(sizes: Sizes, device: Device, slots: int | None) -> Fit:
    """What fits, or the slots that were asked for if they do."""
    found = fit(sizes, device)
    if slots is None:
        return found
    if slots < sizes.top_k or (found.runs and slots > found.slots):
        raise UsageError(
            f"--slots-per-layer {slots}: a token needs {sizes.top_k}, and {found.slots} fit beside the rest on "
            f"{device.name}"
        )
    return replace(found, slots=min(slots, found.slots))


def _helps(
    sizes: Sizes, slots: int, usual: Point, device: Device, trace_misses: Misses | None
) -> tuple[tuple[str, Point], ...]:
    """What would shorten a token, the most helpful first."""
    half = replace(sizes, blob_bytes=sizes.blob_bytes // 2, expert_bytes=sizes.expert_bytes // 2)
    more = min(sizes.experts, 2 * slots)
    fast = f"a drive of {device.storage.high.value / 1e9:.1f} GB/s"
    small = f"experts of half the bytes, {more} slots per layer (no such bundle yet)"
    if trace_misses is not None:
        options = [
            (fast, point(sizes, device, trace_misses(slots), "high")),
            (small, point(half, device, trace_misses(more))),
        ]
    else:
        assert usual.overlap is not None
        tuned = min(1.0, usual.overlap * (1 + TUNED_GAIN))
        options = [
            (fast, estimate(sizes, device, slots, usual.overlap, "high")),
            (
                f"a tuned router: overlap {tuned:.3f} instead of {usual.overlap:.3f}",
                estimate(sizes, device, slots, tuned),
            ),
            (small, estimate(half, device, more, usual.overlap)),
        ]
    if device.overheads is not None:
        options = options[1:]  # its rates are those of one measured drive, not of drives that one could buy
    better = [(name, result) for name, result in options if result.tpot_ms < usual.tpot_ms]
    return tuple(sorted(better, key=lambda item: item[1].tpot_ms))
