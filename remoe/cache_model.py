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
    """The cache-prior bias (arXiv 2412.00099): z' = z + strength * spread * mask(cached, or among the true `top_j`).

    `strength` is its lambda, `slots` the size of the LRU cache per layer.
    """

    strength: float
    slots: int
    top_j: int = 1


def choose_with_prior(
    config: RouterConfig, logits: Tensor, bias: Tensor | None, segments: Tensor, prior: Prior, spread: float
) -> Tensor:
    """Experts [N, K] of one layer where each choice leans towards what the choices before it left in the cache.

    `spread` is the layer's mean of max z - min z. One step after another: what is cached depends on every choice
    before. No gradient.
    """
    with torch.no_grad():
        bonus = prior.strength * spread
        favoured = as_mask(choose(config, logits, bias)[:, : prior.top_j], config.num_experts)
        if config.scoring != "softmax" or bias is not None or config.num_groups > 1:
            return _step_by_step(config, logits, bias, favoured, segments, prior, bonus)
        raw, lifted = logits.double().cpu().numpy(), (logits.double() + bonus).cpu().numpy()
        base = np.where(favoured.cpu().numpy(), lifted, raw)
        cache, result, before = _Recency(config.num_experts, prior.slots), [], -1
        for row, up, segment in zip(base, lifted, segments.tolist(), strict=True):
            if segment != before:
                cache.clear()
                before = segment
            biased = np.where(cache.held, up, row)
            best = np.argsort(-biased, kind="stable")[: config.top_k]
            cache.use(best.tolist())
            result.append(best)
        return torch.from_numpy(np.stack(result)).to(logits.device)


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


def _step_by_step(
    config: RouterConfig,
    logits: Tensor,
    bias: Tensor | None,
    favoured: Tensor,
    segments: Tensor,
    prior: Prior,
    bonus: float,
) -> Tensor:
    """The general case, with the family's own choice in every step."""
    logits, favoured = logits.cpu(), favoured.cpu()
    bias_cpu = None if bias is None else bias.cpu()
    cache, result, before = _Recency(config.num_experts, prior.slots), [], -1
    for row, liked, segment in zip(logits, favoured, segments.tolist(), strict=True):
        if segment != before:
            cache.clear()
            before = segment
        lift = liked | torch.from_numpy(cache.held)
        best = choose(config, row + bonus * lift, bias_cpu)
        cache.use(best.tolist())
        result.append(best)
    return torch.stack(result).to(segments.device)


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
    changed = torch.ones(steps, dtype=torch.bool, device=experts.device)
    changed[1:] = segments[1:] != segments[:-1]
    start = torch.where(changed, times, 0).cummax(0).values  # first step of the token's document
    last = last.masked_fill(last < start[:, None] * top_k, -1)
    if slots >= num_experts:
        return last >= 0
    newest = last.topk(slots, dim=-1)
    return torch.zeros_like(last, dtype=torch.bool).scatter_(-1, newest.indices, newest.values >= 0)
