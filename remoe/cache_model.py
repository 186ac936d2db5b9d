"""What an LRU cache of the deployed size holds before every step, for a whole sequence at once.

The content of an LRU cache of C slots is the C distinct experts used last, so no loop over steps is needed. The order
within a step is the running cache's: hits in the router's order, then misses in the router's order. Every document
starts with an empty cache. Shapes as in remoe/routing.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from remoe.routing import as_mask, choose
from runtime.cache_prior import CachePrior, raise_logits
from runtime.config import RouterConfig
from runtime.demand import Demand

Array = np.ndarray[Any, np.dtype[Any]]


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
    """Cache-prior routing by the engine's rule (runtime/cache_prior.py), with a cache of `slots` per layer."""

    options: CachePrior
    slots: int
    policy: Literal["lru", "gate"] = "lru"


def choose_with_prior(
    config: RouterConfig, logits: Tensor, bias: Tensor | None, segments: Tensor, prior: Prior
) -> Tensor:
    """Experts [N, K] of one layer, logits [N, E], where each choice leans towards what those before left in the cache.

    The n-th tokens of all documents at once, because what is cached depends on every choice before. No gradient.
    """
    with torch.no_grad():
        cached, beside = (raised.cpu().numpy() for raised in _raised(prior, config, logits, segments))
        liked, rows = _liked(config, logits, bias, prior).cpu().numpy(), logits.cpu().numpy()
        plain = config.scoring == "softmax" and bias is None and config.num_groups == 1
        bias = None if bias is None else bias.cpu()
        documents, turns = _turns(segments)
        cache = _contents(prior.policy, documents.max() + 1, config, prior.slots)
        chosen = np.empty((len(rows), config.top_k), dtype=np.int64)
        for turn in turns:
            held = cache.held(documents[turn])
            others = np.where(_full(prior, config, held), rows[turn], beside[turn])
            biased = np.where(held | liked[turn], cached[turn], others)
            if plain:
                chosen[turn] = np.argsort(-biased, axis=-1, kind="stable")[:, : config.top_k]
            else:
                chosen[turn] = choose(config, torch.from_numpy(biased), bias).numpy()
            cache.use(documents[turn], held, chosen[turn], rows[turn])
        return torch.from_numpy(chosen).to(logits.device)


def demand_contents(config: RouterConfig, logits: Tensor, experts: Tensor, segments: Tensor, slots: int) -> Tensor:
    """As lru_contents, for one layer under the gate-aware policy: bool [N, E] of logits [N, E], experts [N, K]."""
    rows, chosen = logits.detach().cpu().numpy(), experts.cpu().numpy()
    documents, turns = _turns(segments)
    cache = _contents("gate", documents.max() + 1, config, slots)
    held = np.empty(rows.shape, dtype=bool)
    for turn in turns:
        held[turn] = cache.held(documents[turn])
        cache.use(documents[turn], held[turn], chosen[turn], rows[turn])
    return torch.from_numpy(held).to(experts.device)


def biased_logits(
    config: RouterConfig, logits: Tensor, bias: Tensor | None, segments: Tensor, prior: Prior, held: Tensor
) -> Tensor:
    """What the choice with a prior goes by, with a gradient: logits [N, E] of one layer, `held` [N, E] in its cache."""
    cached, beside = _raised(prior, config, logits, segments)
    others = torch.where(_full(prior, config, held), logits, beside)
    return torch.where(held | _liked(config, logits, bias, prior), cached, others)


def _raised(prior: Prior, config: RouterConfig, logits: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of experts in the cache, and of the others while it has a free slot."""
    spreads = _spreads(logits.detach(), segments)
    cached, beside = (raise_logits(prior.options, config, logits, spreads, s) for s in (1.0, prior.options.free_share))
    return cached, beside


def _full(prior: Prior, config: RouterConfig, held: Any) -> Any:
    """Whether a cache with the experts held [..., E] has no free slot: [..., 1]."""
    return (held.sum(-1) >= min(prior.slots, config.num_experts))[..., None]


def _contents(policy: str, documents: int, config: RouterConfig, slots: int) -> _Recency | _ByDemand:
    kind = _Recency if policy == "lru" else _ByDemand
    return kind(documents, config, min(slots, config.num_experts))


class _Recency:
    """LRU caches of one layer, one per document."""

    def __init__(self, documents: int, config: RouterConfig, slots: int) -> None:
        self._when = np.full((documents, config.num_experts), -1, dtype=np.int64)  # of the last use
        self._now, self._slots = 0, slots

    def held(self, documents: Array) -> Array:
        """bool [D, E]: the `slots` experts used last."""
        when = self._when[documents]
        oldest = np.partition(when, -self._slots, axis=-1)[:, -self._slots, None]
        return (when >= oldest) & (when >= 0)

    def use(self, documents: Array, held: Array, experts: Array, logits: Array) -> None:
        """A step's experts [D, K]: hits first, then misses, each in the router's order, whatever the logits."""
        hit = np.take_along_axis(held, experts, axis=-1)
        rank = np.where(hit, hit.cumsum(-1) - 1, hit.sum(-1, keepdims=True) + (~hit).cumsum(-1) - 1)
        self._when[documents[:, None], experts] = self._now + rank
        self._now += experts.shape[-1]


class _ByDemand:
    """Gate-aware caches of one layer, one per document."""

    def __init__(self, documents: int, config: RouterConfig, slots: int) -> None:
        self._demand, self._slots = Demand(documents, config), slots  # a document is what a layer is in the engine
        self._held = np.zeros((documents, config.num_experts), dtype=bool)

    def held(self, documents: Array) -> Array:
        """bool [D, E]."""
        return self._held[documents]

    def use(self, documents: Array, held: Array, experts: Array, logits: Array) -> None:
        """A step's experts [D, K] and logits [D, E]: those stay, and of the others the ones most in demand."""
        for document, row, chosen in zip(documents, logits, experts, strict=True):
            self._demand.see(document, row[None], chosen[None])
        worth = np.where(held, self._demand.values[documents], -np.inf)
        np.put_along_axis(worth, experts, np.inf, axis=-1)
        least = np.partition(worth, -self._slots, axis=-1)[:, -self._slots, None]
        self._held[documents] = (worth >= least) & (worth > -np.inf)


def _turns(segments: Tensor) -> tuple[Array, list[Array]]:
    """Number of each token's document [N], and the n-th tokens of all documents for n = 0, 1, ..."""
    places = np.arange(len(segments)) - _starts(segments).cpu().numpy()
    documents = (places == 0).cumsum() - 1
    order = np.argsort(places, kind="stable")
    return documents, np.split(order, np.flatnonzero(np.diff(places[order])) + 1)


def _liked(config: RouterConfig, logits: Tensor, bias: Tensor | None, prior: Prior) -> Tensor:
    """bool [N, E]: the true top J."""
    return as_mask(choose(config, logits, bias)[:, : prior.options.top_j], config.num_experts)


def _spreads(logits: Tensor, segments: Tensor) -> Tensor:
    """Mean of max - min over the tokens of a document so far, [N, 1]."""
    total = (logits.amax(-1) - logits.amin(-1)).double().cumsum(0)
    start = _starts(segments)
    before = torch.where(start > 0, total[(start - 1).clamp_min(0)], 0.0)
    count = torch.arange(1, len(segments) + 1, device=segments.device) - start
    return ((total - before) / count).to(logits.dtype)[:, None]


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
