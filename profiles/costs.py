"""What the parts of a token cost on a device, and from them the time of a layer: one formula for every forecast.

    layer = dense + routing + max( reading + last missed expert, shared + all experts ) + misses + what is not hidden

Reading begins before anything is computed; missed experts are computed as they land. Without overheads in the device
profile this is a floor: no schedule of these parts is faster. `overlap_loss` is the share of the shorter side (reading,
or the arithmetic beside it) that a measured engine did not hide behind the longer one.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from profiles.device import Device, Overheads, ReadRate
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
    miss_s: float = 0.0  # per missed expert, beside its reading
    overlap_loss: float = 0.0


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of layers: the whole, and how much of it nothing could be computed for want of experts."""

    total_s: Array
    waiting_s: Array


def layer_times(costs: Costs, top_k: int, misses: Array) -> LayerTimes:
    """Times of layers that miss `misses` of their `top_k` experts; an array of any shape."""
    reading = np.where(misses > 0, costs.read_s(misses), 0.0)
    last = np.minimum(1.0, misses) * costs.expert_s
    resident = costs.shared_s + (top_k - misses) * costs.expert_s
    beside = resident + np.maximum(0.0, misses * costs.expert_s - last)  # all but the last missed expert
    waiting = np.maximum(0.0, reading - beside)
    hidden = np.minimum(reading, beside)
    total = costs.layer_s + beside + waiting + last + misses * costs.miss_s + costs.overlap_loss * hidden
    return LayerTimes(total, waiting)


def device_costs(
    sizes: Sizes, device: Device, drive: Drive = "typical", read_threads: int = EngineOptions.read_threads
) -> Costs:
    """Of a model on a device. `drive` scales what the drive gives to its low or high rate."""
    memory, overheads = device.memory_read_bytes_per_s.value, device.overheads
    fixed = _Fixed.of(overheads)
    dispatch = fixed.expert_s if sizes.shared_bytes else 0.0
    share, loss = _streaming(device, sizes.blob_bytes)
    return Costs(
        token_s=sizes.head_bytes / memory + fixed.token_s,
        layer_s=sizes.dense_layer_bytes / memory + sizes.blocks / sizes.layers * fixed.block_s + fixed.routing_s,
        shared_s=sizes.shared_bytes / memory + dispatch,
        expert_s=sizes.expert_bytes / memory + fixed.expert_s,
        read_s=_reader(sizes.blob_bytes, device, drive, read_threads, share),
        miss_s=fixed.miss_s,
        overlap_loss=loss,
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
    miss_s: float = 0.0

    @classmethod
    def of(cls, overheads: Overheads | None) -> _Fixed:
        return cls(**{name: figure.value for name, figure in vars(overheads).items()}) if overheads else cls()


def _streaming(device: Device, blob_bytes: int) -> tuple[float, float]:
    """Read share and overlap loss for blobs of this size, between the measured sizes."""
    found = sorted(device.streaming, key=lambda stream: stream.blob_bytes)
    if not found:
        return 1.0, 0.0
    places = np.log([stream.blob_bytes for stream in found])
    columns = ([s.read_share.value for s in found], [s.overlap_loss.value for s in found])
    share, loss = (float(np.interp(math.log(blob_bytes), places, column)) for column in columns)
    return share, loss


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
