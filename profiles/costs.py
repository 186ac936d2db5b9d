"""What the parts of a token cost on a device, and from them the time of a layer: one formula for every forecast, and
for the schedule floor of every benchmark (profiles/floor.py gives it measured parts).

    layer = dense + routing + max( reading, beside ) + last missed expert
    beside = shared + resident experts + missed experts but the last + handling
    handling = what a layer that misses costs once + misses x what each one costs

Reading begins before anything is computed; missed experts are computed as they land. Handling is what reads take from
the processor that computes; while the arithmetic waits for the drive anyway, it costs nothing. Without overheads and
handling in the device profile this is a floor: no schedule of these parts is faster.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from profiles.device import STREAMING, Device, Overheads, ReadRate
from profiles.sizes import Sizes
from runtime.loader import cut
from runtime.options import EngineOptions

Array = np.ndarray[Any, np.dtype[np.float64]]
Drive = Literal["low", "typical", "high"]


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a token; `read_s` maps misses of a layer (0 and fractions allowed) to reading time."""

    token_s: float  # head, and what is done once per token
    layer_s: float  # dense blocks and routing per layer with experts
    shared_s: float
    expert_s: float
    read_s: Callable[[Array], Array]
    reading_s: float = 0.0  # of handling: per layer that misses anything
    miss_s: float = 0.0  # of handling: per missed expert


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of layers: the whole, and how much of it nothing could be computed for want of experts."""

    total_s: Array
    waiting_s: Array


def layer_times(costs: Costs, top_k: int | Array, misses: Array) -> LayerTimes:
    """Times of layers that miss `misses` of their `top_k` experts; arrays of any shape."""
    reading = np.where(misses > 0, costs.read_s(misses), 0.0)
    any_missed = np.minimum(1.0, misses)
    last = any_missed * costs.expert_s
    handling = any_missed * costs.reading_s + misses * costs.miss_s
    beside = costs.shared_s + top_k * costs.expert_s - last + handling
    waiting = np.maximum(0.0, reading - beside)
    return LayerTimes(costs.layer_s + beside + waiting + last, waiting)


def device_costs(
    sizes: Sizes, device: Device, drive: Drive = "typical", read_threads: int = EngineOptions.read_threads
) -> Costs:
    """Of a model on a device. `drive` scales what the drive gives to its low or high rate."""
    memory, overheads = device.memory_read_bytes_per_s.value, device.overheads
    fixed = _Fixed.of(overheads)
    dispatch = fixed.expert_s if sizes.shared_bytes else 0.0
    share, reading, miss = _streaming(device, sizes.blob_bytes)
    return Costs(
        token_s=sizes.head_bytes / memory + fixed.token_s,
        layer_s=sizes.dense_layer_bytes / memory + sizes.blocks / sizes.layers * fixed.block_s + fixed.routing_s,
        shared_s=sizes.shared_bytes / memory + dispatch,
        expert_s=sizes.expert_bytes / memory + fixed.expert_s,
        read_s=_reader(sizes.blob_bytes, device, drive, read_threads, share),
        reading_s=reading,
        miss_s=miss,
    )


def read_rate(reads: tuple[ReadRate, ...], block_bytes: float, depth: float) -> float:
    """Bytes per second between the measured points, by powers of both; beyond them the nearest point's."""
    by_block: dict[int, list[tuple[float, float]]] = {}
    for rate in sorted(reads, key=lambda rate: (rate.block_bytes, rate.depth)):
        by_block.setdefault(rate.block_bytes, []).append((rate.depth, rate.bytes_per_s.value))
    return _between([(block, _between(points, depth)) for block, points in by_block.items()], block_bytes)


@dataclass(frozen=True)
class _Fixed:
    """The values of Overheads; those of a device where nobody has measured them."""

    token_s: float = 0.0
    block_s: float = 0.0
    routing_s: float = 0.0
    expert_s: float = 0.0

    @classmethod
    def of(cls, overheads: Overheads | None) -> _Fixed:
        return cls(**{name: figure.value for name, figure in vars(overheads).items()}) if overheads else cls()


def _streaming(device: Device, blob_bytes: int) -> tuple[float, float, float]:
    """Read share, and seconds per layer that misses and per miss, for blobs of this size, between the measured sizes.

    A device where nobody has measured them reads at its drive's rate and handles reads for nothing, which is the floor.
    """
    found = sorted(device.streaming, key=lambda stream: stream.blob_bytes)
    if not found:
        return 1.0, 0.0, 0.0
    places = np.log([stream.blob_bytes for stream in found])
    columns = [[getattr(s, name).value for s in found] for name in STREAMING]
    share, reading, miss = (float(np.interp(math.log(blob_bytes), places, column)) for column in columns)
    return share, reading, miss


def _reader(blob_bytes: int, device: Device, drive: Drive, threads: int, share: float) -> Callable[[Array], Array]:
    """Blobs are cut into chunks, and as many chunks are on their way as there are threads."""
    speed: float = getattr(device.storage, drive).value
    if not device.reads:
        return lambda misses: misses * blob_bytes / (speed * share)
    chunks = len(cut(blob_bytes, threads))
    rates = [
        read_rate(device.reads, blob_bytes / chunks, depth) * share * speed / device.storage.typical.value
        for depth in range(1, threads + 1)
    ]

    def read_s(misses: Array) -> Array:
        depth = np.clip(np.ceil(np.maximum(misses, 1.0) * chunks), 1, threads).astype(int)
        return misses * blob_bytes / np.take(rates, depth - 1)

    return read_s


def _between(points: list[tuple[float, float]], at: float) -> float:
    """`points` (x, y) rise in x; log y is linear in log x between them."""
    places = [x for x, _ in points]
    right = bisect.bisect_left(places, at)
    if right == 0 or right == len(points):
        return points[min(right, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    share = math.log(at / x0) / math.log(x1 / x0)
    return math.exp(math.log(y0) + share * (math.log(y1) - math.log(y0)))
