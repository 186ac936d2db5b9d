"""Cache-prior routing: experts that are in the cache are preferred, without any training.

    z' = raised logit where mask, z elsewhere     z: gate logits of one token; mask: in the cache, or the true top J
    experts = the router's choice from z'
    weights = those that z gives these experts, by the model's own rule

How a logit is raised is the `scaling`. "mean" is the published rule (arXiv 2412.00099): z + strength * D, where D, the
running mean of max z - min z over the tokens of this sequence, makes `strength` mean the same in every layer. "token"
takes z_(1) - z_(K) of this token for D. "energy" is ours: with w_e = s_e / (sum of the K best scores s)

    w_e'^2 = w_e^2 + strength^2

Outputs of experts are nearly orthogonal, so to leave out an expert of weight w changes a token's output by about w. Two
logits are as far apart at the top, where the weights are large, as at the bottom, where they hardly matter; squares of
weights are not. Where the model does not divide weights by their sum they keep the sum of the router's own choice, so
that a layer adds no less than it would. And what is read into a free slot sends nobody away, and stays: while a cache
has one, experts that are not in it gain four fifths of strength^2, too. docs/results/router-tuning.md compares the
three.

With strength 0 it is stock routing, bit for bit. A prompt is routed by the stock rule: its experts are read once
anyway.

What comes out now depends on what is in the cache, so on slots, policy and what ran before; it is the same whenever
these are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch

from runtime.config import RouterConfig
from runtime.errors import UsageError
from runtime.prior_rows import Array, Preferred, Spread, prefer_cached, weigh_preferred
from runtime.router import Observer, Routed, Router

Scaling = Literal["mean", "token", "energy"]
_NONE = np.zeros((1, 1))
_FREE_SLOT = 0.8  # of the energy; with all of it a cache that can hold most experts would read them all for small gains


@dataclass(frozen=True)
class CachePrior:
    """How strongly cached experts are preferred. `top_j` of the true choice are never put behind them."""

    strength: float = 0.1
    top_j: int = 1
    scaling: Scaling = "mean"

    def check(self, top_k: int) -> None:
        """Raises UsageError for values that cannot be."""
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise UsageError(f"--prior-strength {self.strength}: expected a number from 0 (stock routing) up")
        if not 0 <= self.top_j <= top_k:
            raise UsageError(f"--prior-top-j {self.top_j}: expected 0 to {top_k}, the experts of a token")
        if self.scaling not in get_args(Scaling):
            raise UsageError(f"unknown prior scaling {self.scaling!r} (known: {', '.join(get_args(Scaling))})")

    def keeps_sum(self, config: RouterConfig) -> bool:
        """Whether weights are scaled to the sum of the router's own."""
        return self.strength > 0 and self.scaling == "energy" and not config.normalise

    @property
    def free_share(self) -> float:
        """Of what a cached expert gains: what the others gain while the cache has a free slot."""
        return _FREE_SLOT if self.scaling == "energy" else 0.0

    def __str__(self) -> str:
        return f"cache-prior strength={self.strength:g} top_j={self.top_j} scaling={self.scaling}"


def raise_logits(
    options: CachePrior, config: RouterConfig, logits: torch.Tensor, spread: torch.Tensor, share: float = 1.0
) -> torch.Tensor:
    """Logits [..., E] as they count for an expert that is preferred, or gains a `share` of that; `spread` [..., 1] is
    the mean one.

    Each row by itself and with a gradient: for training with the rule. Routing goes by runtime/prior_rows.py.
    """
    if options.strength == 0 or share == 0:
        return logits
    if options.scaling == "energy":
        return _add_energy(config, logits, options.strength * math.sqrt(share))
    if options.scaling == "token":
        best = logits.topk(config.top_k).values
        spread = best[..., :1] - best[..., -1:]
    return logits + share * options.strength * spread


def _add_energy(config: RouterConfig, logits: torch.Tensor, strength: float) -> torch.Tensor:
    """log s' = log sqrt(s^2 + (strength * sum of the K best scores)^2), as a logit again."""
    softmax = config.scoring == "softmax"
    log_s = logits if softmax else torch.nn.functional.logsigmoid(logits)
    floor = log_s.topk(config.top_k).values.logsumexp(-1, keepdim=True) + math.log(strength)
    raised = torch.logaddexp(2 * log_s, 2 * floor) / 2
    if softmax:
        return raised
    raised = raised.clamp(max=-1e-6)  # a score is below 1
    return raised - (-raised.expm1()).log()


class HeldExperts(Protocol):
    """What cache-prior routing asks the cache."""

    def held(self, layer: int) -> Array:
        """Which experts of a layer are in it: bool [E]."""
        ...

    def full(self, layer: int) -> bool:
        """Whether what the layer misses next can only be read in another expert's place."""
        ...


class CachePriorRouter:
    """A router whose choice for single tokens leans towards what is in the cache. `agreement` tells how much."""

    def __init__(self, router: Router, cache: HeldExperts, options: CachePrior) -> None:
        """Raises UsageError for options that cannot be."""
        options.check(router.config.top_k)
        self.config, self.options = router.config, options
        self._biases = {layer: bias.cpu().numpy() for layer, bias in router.biases.items()}
        self._router, self._cache = router, cache
        self.begin()

    @property
    def observer(self) -> Observer | None:
        """As of the router inside."""
        return self._router.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._router.observer = observer

    def begin(self) -> None:
        """A new sequence starts: forget the mean spread and the agreement of the last one."""
        self._spreads = {layer: Spread() for layer in self._router.layers}
        self._same = self._asked = 0

    @property
    def agreement(self) -> float | None:
        """Of the experts chosen for single tokens of this sequence, the share that stock routing chooses, too."""
        return self._same / self._asked if self._asked else None

    def route(self, layer: int, h: torch.Tensor) -> Routed:
        """As Router.route; only a single row may be routed away from the stock choice."""
        if len(h) == 1 and self.options.strength > 0:
            return self._lean(layer, h)
        routed = self._router.route(layer, h)
        self._spread(layer, routed.logits.cpu().numpy())
        if len(h) == 1:
            self._count(self.config.top_k)
        return routed

    def guess(self, layer: int, h: torch.Tensor) -> list[int]:
        """See Routing.guess: by the same rule, with what is in the cache now."""
        rows = self._router.logits(layer, h).cpu().numpy()
        experts: list[int] = self._prefer(layer, rows, self._spreads[layer].mean).experts[0].tolist()
        return experts

    def _prefer(self, layer: int, rows: Array, spread: Array) -> Preferred:
        """Logits [1, E] to experts."""
        held, full = self._cache.held(layer)[None], np.array([[self._cache.full(layer)]])
        return prefer_cached(self.options, self.config, rows, self._biases.get(layer), held, full, spread)

    def _lean(self, layer: int, h: torch.Tensor) -> Routed:
        logits = self._router.logits(layer, h)
        rows = logits.cpu().numpy()
        found = self._prefer(layer, rows, self._spread(layer, rows))
        self._count(len({*found.experts[0].tolist()} & {*found.stock[0].tolist()}))
        weights = torch.from_numpy(weigh_preferred(self.options, self.config, found)).to(h.device)
        routed = Routed(torch.from_numpy(found.experts).to(h.device), weights, logits)
        if self.observer is not None:
            self.observer(layer, h, logits, routed.experts, weights)
        return routed

    def _spread(self, layer: int, logits: Array) -> Array:
        """Of the sequence so far, [1, 1]; only one of the scalings asks for it."""
        return self._spreads[layer].update(logits) if self.options.scaling == "mean" else _NONE

    def _count(self, same: int) -> None:
        """A token was routed here; so many of its experts are the router's own choice."""
        self._same += same
        self._asked += self.config.top_k
