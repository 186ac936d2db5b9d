"""Figures of a trace: how alike the experts of neighbouring tokens are, and how evenly experts are used.

All are over decode steps, and no pair or segment of tokens crosses a request. None stands for what a trace is too short
to tell. Shapes as in remoe/trace.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe.trace import Trace

Array = np.ndarray[Any, np.dtype[Any]]
SEGMENT = 16  # tokens


@dataclass(frozen=True)
class Locality:
    """The routing statistics of a trace; see the functions for their formulas."""

    overlap: float | None
    load_cv: float
    load_entropy: float
    distinct_experts: float
    srp: float | None
    sch: float | None


def locality(trace: Trace, slots: int, segment: int = SEGMENT) -> Locality:
    """All of them; `slots` per layer is the cache of SCH."""
    loads = expert_loads(trace)
    return Locality(
        overlap=expert_overlap(trace),
        load_cv=load_cv(loads),
        load_entropy=load_entropy(loads),
        distinct_experts=distinct_experts(trace),
        srp=segment_routing(trace, segment),
        sch=segment_cache(trace, segment, slots),
    )


def expert_overlap(trace: Trace) -> float | None:
    """EOR: the mean over steps and layers of |E_t n E_(t-1)| / K."""
    same = pairs = 0
    for experts in _decoded(trace):
        same += int((experts[1:, :, :, None] == experts[:-1, :, None, :]).sum())
        pairs += experts[1:].size
    return same / pairs if pairs else None


def expert_loads(trace: Trace) -> Array:
    """int64 [L, E]: how often each expert was chosen."""
    loads = np.zeros((len(trace.info.moe_layers), trace.info.num_experts), np.int64)
    for layer in range(len(loads)):
        loads[layer] = np.bincount(trace.experts[trace.decode == 1, layer].ravel(), minlength=loads.shape[1])
    return loads


def load_cv(loads: Array) -> float:
    """Coefficient of variation of the load over experts, mean over layers; 0 is even, sqrt(E - 1) all on one."""
    return float((loads.std(axis=1) / loads.mean(axis=1)).mean())


def load_entropy(loads: Array) -> float:
    """Entropy of the load over experts / log E, mean over layers; 1 is even, 0 all on one."""
    if loads.shape[1] == 1:
        return 1.0
    share = loads / loads.sum(axis=1, keepdims=True)
    terms = np.where(share > 0, -share * np.log(np.where(share > 0, share, 1)), 0)
    return float((terms.sum(axis=1) / np.log(loads.shape[1])).mean())


def distinct_experts(trace: Trace) -> float:
    """Distinct experts per request and layer, mean."""
    counts = [len(np.unique(experts[:, layer])) for experts in _decoded(trace) for layer in range(experts.shape[1])]
    return float(np.mean(counts))


def segment_routing(trace: Trace, segment: int = SEGMENT) -> float | None:
    """SRP: how well one fixed set of experts could stand for the routing of `segment` tokens (arXiv 2505.16056).

    Experts that at least c of a segment's tokens chose form its set, one c for all segments of a layer. Their uses over
    (set size x segment) is the precision, over (K x segment) the recall; SRP is the best F1 over c, mean over layers.
    """
    counts = _segment_counts(trace, segment)
    if counts is None:
        return None
    scores = []
    for layer in range(counts.shape[1]):
        # How often each count occurs; then sets of "count >= c" for every c at once.
        occurs = np.bincount(counts[:, layer].ravel(), minlength=segment + 1)
        sizes = occurs[::-1].cumsum()[::-1]
        uses = (occurs * np.arange(segment + 1))[::-1].cumsum()[::-1]
        scores.append((2 * uses / (sizes * segment + uses[0])).max())
    return float(np.mean(scores))


def segment_cache(trace: Trace, segment: int = SEGMENT, slots: int = 1) -> float | None:
    """SCH: hit rate of the best fixed content of `slots` per layer for each segment (arXiv 2505.16056, version 1)."""
    counts = _segment_counts(trace, segment)
    if counts is None:
        return None
    best = np.sort(counts, axis=-1)[..., -slots:].sum()
    return float(best / counts.sum())


def _decoded(trace: Trace) -> list[Array]:
    """experts [n, L, K] of every request's decode steps."""
    found = [trace.experts[rows.start : rows.stop] for rows in trace.request_rows()]
    decode = [trace.decode[rows.start : rows.stop] == 1 for rows in trace.request_rows()]
    return [experts[steps] for experts, steps in zip(found, decode, strict=True) if steps.any()]


def _segment_counts(trace: Trace, segment: int) -> Array | None:
    """int [segments, L, E]: uses of each expert in every run of `segment` tokens of a request; None without any."""
    found = []
    layers, experts = len(trace.info.moe_layers), trace.info.num_experts
    for chosen in _decoded(trace):
        if len(chosen) >= segment:
            used = np.zeros((len(chosen) + 1, layers, experts), np.int32)
            np.put_along_axis(used[1:], chosen.astype(np.int64), 1, axis=-1)
            used = used.cumsum(axis=0, dtype=np.int32)
            found.append((used[segment:] - used[:-segment]).astype(np.uint16))
    return np.concatenate(found) if found else None
