"""TPOT of recorded routing on a device: misses per token and layer, and the costs of profiles/costs.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from profiles.costs import Drive, device_costs, layer_times
from profiles.device import Device
from profiles.sizes import Sizes
from remoe.simulate import Setting, simulate
from remoe.trace import Trace
from runtime.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Milliseconds of every token [N]: with the drive's usual rate, its high one and its low one.

    `waiting_ms` is the part of the usual time in which nothing can be computed for want of experts. With a device
    profile without overheads these are floors.
    """

    tpot_ms: Array
    fast_ms: Array
    slow_ms: Array
    waiting_ms: Array


def predict(sizes: Sizes, device: Device, misses: Array) -> Prediction:
    """`misses` [N, L] of decode steps, L the layers with experts."""
    return Prediction(
        tpot_ms=_tokens_ms(sizes, device, misses, "typical"),
        fast_ms=_tokens_ms(sizes, device, misses, "high"),
        slow_ms=_tokens_ms(sizes, device, misses, "low"),
        waiting_ms=1000 * layer_times(device_costs(sizes, device), sizes.top_k, _floats(misses)).waiting_s.sum(axis=1),
    )


def trace_misses(trace: Trace, sizes: Sizes, policy: str = "lru") -> Callable[[int], Array]:
    """Slots per layer to the misses [N, L] of the trace's decode steps, each request with a cold cache.

    Raises UsageError when the trace is of another model.
    """
    check_model(trace, sizes)
    decode = trace.decode.astype(bool)

    def misses(slots: int) -> Array:
        return simulate(trace, Setting(policy, slots_per_layer=slots)).missed[decode]

    return misses


def check_model(trace: Trace, sizes: Sizes) -> None:
    """Raises UsageError unless the trace has the layers, experts, top-k and blobs of the model."""
    info = trace.info
    found = _shape(len(info.moe_layers), info.top_k, info.num_experts, info.expert_bytes)
    wanted = _shape(sizes.layers, sizes.top_k, sizes.experts, sizes.blob_bytes)
    if found != wanted:
        raise UsageError(f"the trace is of {info.model}, which has {found}; this model has {wanted}")


def _shape(layers: int, top_k: int, experts: int, blob_bytes: int) -> str:
    return f"{layers} layers, top {top_k} of {experts} experts, {blob_bytes} bytes each"


def _tokens_ms(sizes: Sizes, device: Device, misses: Array, drive: Drive) -> Array:
    costs = device_costs(sizes, device, drive)
    return 1000 * (costs.token_s + layer_times(costs, sizes.top_k, _floats(misses)).total_s.sum(axis=1))


def _floats(misses: Array) -> Array:
    return np.asarray(misses, dtype=np.float64)
