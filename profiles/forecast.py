"""What to expect of a model on a board before anything is downloaded: does it fit, how often experts are read, how long
a token takes at least, what limits it, what would help.

The times are floors for the hit rate that is told with them: no schedule of these parts is faster, and an engine is
slower. None has been checked on a board.

    hit rate       = r + (1 - r) (S - K) / (E - K)       S slots and E experts per layer, K per token
    time of a layer = dense + max(misses x blob / drive, shared + resident experts) + last missed expert

r is the overlap: the share of a token's experts that the token before had, too. LRU with S >= K keeps those; what else
is in the slots is taken for a uniform draw from the other experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from profiles.device import Device, Figure
from runtime import layout
from runtime.config import ModelConfig
from runtime.errors import UsageError
from runtime.memory import OVERHEAD_BYTES

PLAN_CONTEXT = 4096
# Overlap of stock routers as a multiple of what chance would give (K / E), from the ReMoE paper: Qwen1.5-MoE-A2.7B
# .1695 of 4/60, DeepSeek-V2-Lite .273 of 6/64. Tuning raised them by 27.2 % and 26.4 %.
CHANCE, USUAL, HIGH = 1.0, 0.1695 / (4 / 60), 0.273 / (6 / 64)
TUNED_GAIN = 0.264
_VALUE_BYTES = 2  # fp16


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model: what stays in memory, and what one token's arithmetic reads per layer with experts."""

    resident_bytes: int  # dense weights and routers
    kv_bytes: int
    head_bytes: int
    dense_layer_bytes: float  # dense weights without the shared experts, all layers spread over those with experts
    shared_bytes: float
    expert_bytes: int
    blob_bytes: int
    layers: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class Fit:
    """The memory sum of a board. `slots` per layer; fewer than top-k means that the model does not run."""

    usable_bytes: int
    expert_bytes: int
    slots: int
    runs: bool


@dataclass(frozen=True)
class Point:
    """One forecast: rates in bytes/s, `tpot_ms` a floor, `drive_ms` the part of it that waits for the drive."""

    overlap: float
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


def model_sizes(config: ModelConfig, context: int) -> Sizes:
    """From the config alone; fp16 as in a bundle. Raises UsageError for a context that the model does not have."""
    if not 1 <= context <= config.max_context:
        raise UsageError(f"--context {context}: this model allows {config.max_context} tokens")
    layers, moe = range(config.num_layers), len(config.moe_layers)
    dense = sum(_bytes(layout.layer_tensors(config, layer)) for layer in layers)
    shared = 3 * config.hidden_size * config.shared_intermediate_size * _VALUE_BYTES
    head, embed = _bytes(layout.head_tensors(config)), _bytes(layout.embed_tensors(config))
    routers = 4 * sum(math.prod(shape) for shape in layout.router_tensors(config).values())
    row = sum(math.prod(row) for row in config.attention.cache_rows)
    return Sizes(
        resident_bytes=dense + head + embed + routers,
        kv_bytes=context * _VALUE_BYTES * config.num_layers * row,
        head_bytes=head,
        dense_layer_bytes=(dense + routers) / moe - shared,
        shared_bytes=shared,
        expert_bytes=layout.expert_bytes(config),
        blob_bytes=layout.padded(layout.expert_bytes(config)),
        layers=moe,
        experts=config.router.num_experts,
        top_k=config.router.top_k,
    )


def fit(sizes: Sizes, device: Device) -> Fit:
    """Slots beside everything else."""
    usable = int(device.ram_bytes.value - device.system_bytes.value - device.cuda_context_bytes.value) - OVERHEAD_BYTES
    left = max(0, usable - sizes.resident_bytes - sizes.kv_bytes)
    slots = min(sizes.experts, left // (sizes.layers * sizes.blob_bytes))
    return Fit(usable, left, slots, slots >= sizes.top_k)


def hit_rate(sizes: Sizes, slots: int, overlap: float) -> float:
    """Share of a token's experts that are in the cache."""
    if slots >= sizes.experts:
        return 1.0
    return overlap + (1 - overlap) * (slots - sizes.top_k) / (sizes.experts - sizes.top_k)


def point(sizes: Sizes, slots: int, overlap: float, drive_bytes_per_s: float, memory_bytes_per_s: float) -> Point:
    """The floor of a mean token."""
    hits = hit_rate(sizes, slots, overlap) * sizes.top_k
    misses = sizes.top_k - hits
    expert_s = sizes.expert_bytes / memory_bytes_per_s
    reading = misses * sizes.blob_bytes / drive_bytes_per_s
    computing = sizes.shared_bytes / memory_bytes_per_s + hits * expert_s
    layer = sizes.dense_layer_bytes / memory_bytes_per_s + max(reading, computing) + min(1.0, misses) * expert_s
    total = sizes.head_bytes / memory_bytes_per_s + sizes.layers * layer
    return Point(
        overlap=overlap,
        drive_bytes_per_s=drive_bytes_per_s,
        hit_rate=hits / sizes.top_k,
        misses_per_token=sizes.layers * misses,
        read_bytes_per_token=sizes.layers * misses * sizes.blob_bytes,
        tpot_ms=1000 * total,
        drive_ms=1000 * sizes.layers * max(0.0, reading - computing),
    )


def forecast(config: ModelConfig, device: Device, context: int | None = None, overlap: float | None = None) -> Forecast:
    """`overlap` is a measured one; without it, from chance to what the published models have."""
    sizes = model_sizes(config, min(PLAN_CONTEXT, config.max_context) if context is None else context)
    found = fit(sizes, device)
    if not found.runs:
        return Forecast(found, None, None, None)
    if overlap is not None and not 0 <= overlap <= 1:
        raise UsageError(f"--overlap {overlap}: a share of experts lies between 0 and 1")
    chance = sizes.top_k / sizes.experts
    low, usual, high = (min(1.0, overlap if overlap is not None else f * chance) for f in (CHANCE, USUAL, HIGH))
    memory, drive = device.memory_read_bytes_per_s.value, device.storage
    middle = point(sizes, found.slots, usual, drive.typical.value, memory)
    return Forecast(
        fit=found,
        usual=middle,
        best=point(sizes, found.slots, high, drive.high.value, memory),
        worst=point(sizes, found.slots, low, drive.low.value, memory),
        helps=_helps(sizes, found.slots, middle, device),
    )


def assumptions(device: Device) -> list[tuple[str, Figure]]:
    """The figures of the board that a forecast stands on."""
    return [
        ("RAM", device.ram_bytes),
        ("system", device.system_bytes),
        ("CUDA context", device.cuda_context_bytes),
        ("memory, reading", device.memory_read_bytes_per_s),
        ("drive, low", device.storage.low),
        ("drive, usual", device.storage.typical),
        ("drive, high", device.storage.high),
    ]


def _helps(sizes: Sizes, slots: int, middle: Point, device: Device) -> tuple[tuple[str, Point], ...]:
    """What would shorten a token, the most helpful first."""
    memory, drive = device.memory_read_bytes_per_s.value, middle.drive_bytes_per_s
    tuned = min(1.0, middle.overlap * (1 + TUNED_GAIN))
    half = replace(sizes, blob_bytes=sizes.blob_bytes // 2, expert_bytes=sizes.expert_bytes // 2)
    more = min(sizes.experts, 2 * slots)
    fast = device.storage.high.value
    options = [
        (f"a drive of {fast / 1e9:.1f} GB/s", sizes, slots, middle.overlap, fast),
        (f"a tuned router: overlap {tuned:.3f} instead of {middle.overlap:.3f}", sizes, slots, tuned, drive),
        (f"experts of half the bytes, {more} slots per layer (no such bundle yet)", half, more, middle.overlap, drive),
    ]  # fmt: skip
    found = [(name, point(s, n, overlap, rate, memory)) for name, s, n, overlap, rate in options]
    better = [(name, result) for name, result in found if result.tpot_ms < middle.tpot_ms]
    return tuple(sorted(better, key=lambda item: item[1].tpot_ms))


def _bytes(tensors: dict[str, tuple[int, ...]]) -> int:
    return _VALUE_BYTES * sum(math.prod(shape) for shape in tensors.values())
