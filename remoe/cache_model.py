"""What an LRU cache of the deployed size holds before every step, for a whole sequence at once.

The content of an LRU cache of C slots is the C distinct experts used last, so no loop over steps is needed. The order
within a step is the running cache's: hits in the router's order, then misses in the router's order. Every document
starts with an empty cache. Shapes as in remoe/routing.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from remoe.routing import as_mask, choose
from runtime.cache_prior import CachePrior
from runtime.config import RouterConfig


def lru_contents(experts: Tensor, segments: Tensor, num_experts: int, slots: int) -> Tensor:
    """bool [..., N, E]: the cache's content just before each step. No gradient.

    `experts` int64 [..., N, K] in the router's order, `segments` [N] document ids in runs, `slots` >= K per layer.
    """
    top_k = experts.shape[-1]
    assert slots >= top_k, f"a cache of {slots} slots cannot hold the {top_k} experts of one step"
    with torch.no_grad():
        missed = torch.zeros_like(experts, dtype=torch.bool)
        while True:
            # Which of a step's experts came last depends on which were missed; each pass is right for one step more,
            # and in practice the second or third changes nothing.
            held = _used_last(experts, _ranks(missed), segments, num_experts, slots)
            found = ~held.gather(-1, experts)
            if torch.equal(found, missed):
                return held
            missed = found


def misses(experts: Tensor, held: Tensor) -> Tensor:
    """Experts of each step that are not in the cache: int64 [..., N]."""
    return (~held.gather(-1, experts)).sum(-1)


@dataclass(frozen=True)
class Prior:
    """Cache-prior routing by the engine's rule (runtime/cache_prior.py), with an LRU cache of `slots` per layer."""

    options: CachePrior
    slots: int


def choose_with_prior(
    config: RouterConfig, logits: Tensor, bias: Tensor | None, segments: Tensor, prior: Prior
) -> Tensor:
    """Experts [N, K] of one layer, logits [N, E], where each choice leans towards what those before left in the cache.

    One step after another, because what is cached depends on every choice before. No gradient.
    """
    with torch.no_grad():
        stock = choose(config, logits, bias)
        liked = as_mask(stock[:, : prior.options.top_j], config.num_experts).cpu().numpy()
        lift = (prior.options.strength * _spreads(config, logits, segments, prior)).cpu().numpy()
        rows, cache, before = logits.cpu().numpy(), _Recency(config.num_experts, prior.slots), None
        plain = config.scoring == "softmax" and bias is None and config.num_groups == 1
        bias = None if bias is None else bias.cpu()
        result = []
        for row, bonus, first, segment in zip(rows, lift, liked, segments.tolist(), strict=True):
            if segment != before:
                cache.clear()
                before = segment
            biased = row + bonus * (first | cache.held)
            if plain:
                best = np.argsort(-biased, kind="stable")[: config.top_k].tolist()
            else:
                best = choose(config, torch.from_numpy(biased), bias).tolist()
            cache.use(best)
            result.append(best)
        return torch.tensor(result, device=logits.device)


class _Recency:
    """An LRU cache of one layer: `held` bool [E]."""

    def __init__(self, num_experts: int, slots: int) -> None:
        self.held = np.zeros(num_experts, dtype=bool)
        self._order: dict[int, None] = {}  # oldest first
        self._slots = slots

    def use(self, experts: list[int]) -> None:
        """A step's experts: hits first, then misses, each in the router's order."""
        missed = []
        for expert in experts:
            if expert in self._order:
                del self._order[expert]
                self._order[expert] = None
            else:
                missed.append(expert)
        for expert in missed:
            if len(self._order) >= self._slots:
                oldest = next(iter(self._order))
                del self._order[oldest]
                self.held[oldest] = False
            self._order[expert] = None
            self.held[expert] = True

    def clear(self) -> None:
        self._order.clear()
        self.held[:] = False


def _spreads(config: RouterConfig, logits: Tensor, segments: Tensor, prior: Prior) -> Tensor:
    """D of each token [N]: the spread of its own best K logits, or the mean of max - min over its document so far."""
    if prior.options.scaling == "token":
        best = logits.topk(config.top_k, dim=-1).values
        return best[:, 0] - best[:, -1]
    total = (logits.amax(-1) - logits.amin(-1)).double().cumsum(0)
    start = _starts(segments)
    before = torch.where(start > 0, total[(start - 1).clamp_min(0)], 0.0)
    count = torch.arange(1, len(segments) + 1, device=segments.device) - start
    return ((total - before) / count).to(logits.dtype)


def _starts(segments: Tensor) -> Tensor:
    """First step of each token's document, [N]."""
    times = torch.arange(len(segments), device=segments.device)
    changed = torch.ones_like(segments, dtype=torch.bool)
    changed[1:] = segments[1:] != segments[:-1]
    return torch.where(changed, times, 0).cummax(0).values


def _ranks(missed: Tensor) -> Tensor:
    """Order of use within a step, 0 .. K - 1: hits in the router's order, then misses."""
    hits = ~missed
    first = hits.cumsum(-1) - 1
    return torch.where(hits, first, hits.sum(-1, keepdim=True) + missed.cumsum(-1) - 1)


def _used_last(experts: Tensor, ranks: Tensor, segments: Tensor, num_experts: int, slots: int) -> Tensor:
    steps, top_k = experts.shape[-2:]
    times = torch.arange(steps, device=experts.device)
    when = torch.full((*experts.shape[:-1], num_experts), -1, dtype=torch.int64, device=experts.device)
    when.scatter_(-1, experts, times[:, None] * top_k + ranks)
    last = torch.full_like(when, -1)
    last[..., 1:, :] = when.cummax(-2).values[..., :-1, :]  # before the step, not after it
    last = last.masked_fill(last < _starts(segments)[:, None] * top_k, -1)
    if slots >= num_experts:
        return last >= 0
    newest = last.topk(slots, dim=-1)
    return torch.zeros_like(last, dtype=torch.bool).scatter_(-1, newest.indices, newest.values >= 0)
