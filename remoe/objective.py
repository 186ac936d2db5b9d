"""The tuning objective: which terms count how much, and their values for a stack of layers.

    L     = ce * L_CE + lm_kl * L_LM + trust * L_Trust + alpha * L_Loc          alpha = min(1, step / warmup_steps)
    L_Loc = reuse * L_Reuse + smooth * L_Smooth + lag * L_Lag + window * L_WS + margin * L_Margin + miss * L_Miss

L_CE, L_Trust and the first four of L_Loc are ReMoE as published (arXiv 2605.27081), with `reuse_target` "previous".
The rest is beyond it, off by default, and each can be switched on by itself. Terms of a layer are averaged over layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from remoe import losses
from remoe.cache_model import Prior, biased_logits, lru_contents, misses
from remoe.routing import as_mask, choose, expert_overlap, log_distribution, order_values
from runtime.cache_prior import CachePrior, Scaling
from runtime.config import RouterConfig
from runtime.errors import UsageError

LOCALITY = ("reuse", "smooth", "lag", "window", "margin", "miss")
LAYER_TERMS = ("trust", *LOCALITY)


@dataclass(frozen=True)
class Objective:
    """Weights and settings of the terms. The paper publishes no weights: these raise the overlap of neighbouring tokens
    by a third for 0.65 % of perplexity on the model of demo/native (docs/tuning.md).
    """

    ce: float = 1.0
    trust: float = 0.5  # lambda_KL
    reuse: float = 0.3  # lambda_R
    smooth: float = 0.015  # lambda_S
    lag: float = 0.015  # lambda_L
    window: float = 0.015  # lambda_W
    lags: tuple[int, ...] = losses.LAGS
    window_size: int = 16  # W, in steps
    warmup_steps: int = 200  # T_warm of the locality terms

    # Beyond the paper.
    reuse_target: Literal["previous", "cache"] = "previous"
    cache_slots: int = 0  # C per layer of the simulated LRU cache; 0: the router's K
    margin: float = 0.0
    margin_gap: float = 0.1  # gap, reach and softness in standard deviations of a token's reference logits
    margin_reach: float = 1.0
    margin_pairs: int = 4
    miss: float = 0.0
    miss_softness: float = 0.25
    lm_kl: float = 0.0  # KL(stock model || tuned model) of the next-token distribution
    prior: float = 0.0  # strength of the cache-prior bias that is active while tuning, and should be at inference
    prior_top_j: int = 1
    prior_scaling: Scaling = "mean"
    sharpen: float = 1.0  # the terms see softmax(sharpen * logits)
    layer_strength: tuple[float, ...] = ()  # factor on the locality terms of each MoE layer; empty: 1 each
    hidden_gradient: bool = True  # layer terms also reach the gates below, through the hidden state

    def check(self, router: RouterConfig, layers: int) -> None:
        """Refuse what cannot be for this router and number of MoE layers. Raises UsageError naming the setting."""
        weights = {n: getattr(self, n) for n in ("ce", "lm_kl", "prior", *LAYER_TERMS)}
        rules = {
            f"{next((n for n, w in weights.items() if not 0 <= w < 1e9), '')} is not a number from 0 on": all(
                0 <= w < 1e9 for w in weights.values()
            ),
            "every term has the weight 0, so there is nothing to tune": any(
                w for n, w in weights.items() if n != "prior"
            ),
            f"window_size = {self.window_size} is not above 1": self.window_size > 1,
            f"lags = {self.lags} are not positive": all(d > 0 for d in self.lags) and bool(self.lags),
            f"sharpen = {self.sharpen} is not above 0": 0 < self.sharpen < math.inf,
            f"warmup_steps = {self.warmup_steps} is below 0": self.warmup_steps >= 0,
            f"margin_pairs = {self.margin_pairs} is not above 0": self.margin_pairs > 0,
            f"margin_gap = {self.margin_gap} is not a number from 0 on": 0 <= self.margin_gap < math.inf,
            f"margin_reach = {self.margin_reach} is not a number above 0": 0 < self.margin_reach < math.inf,
            f"miss_softness = {self.miss_softness} is not above 0": 0 < self.miss_softness < math.inf,
            f"layer_strength = {self.layer_strength} are not numbers from 0 on": all(
                0 <= x < math.inf for x in self.layer_strength
            ),
            f"reuse_target {self.reuse_target!r} is not previous or cache": self.reuse_target in ("previous", "cache"),
            f"prior_scaling {self.prior_scaling!r} is not one of {', '.join(get_args(Scaling))}": self.prior_scaling
            in get_args(Scaling),
            f"cache_slots = {self.cache_slots} is below the {router.top_k} experts of one token": self.slots(router)
            >= router.top_k,
            f"layer_strength has {len(self.layer_strength)} values for {layers} MoE layers": len(self.layer_strength)
            in (0, layers),
            f"the router chooses all of its {router.num_experts} experts, so there is no routing to tune": router.top_k
            < router.num_experts,
            f"prior_top_j = {self.prior_top_j} is not between 0 and K": 0 <= self.prior_top_j <= router.top_k,
        }
        for problem, holds in rules.items():
            if not holds:
                raise UsageError(f"objective: {problem}")

    def slots(self, router: RouterConfig) -> int:
        """C of the simulated cache."""
        return min(self.cache_slots or router.top_k, router.num_experts)

    def alpha(self, step: int) -> float:
        """Strength of the locality terms in the given step, counted from 1."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0

    def cache_prior(self, router: RouterConfig) -> Prior | None:
        """The bias that is active while tuning."""
        if not self.prior:
            return None
        return Prior(CachePrior(self.prior, self.prior_top_j, self.prior_scaling), self.slots(router))

    @property
    def needs_model(self) -> bool:
        """Whether a term looks at the language model's output."""
        return bool(self.ce or self.lm_kl)


@dataclass(frozen=True)
class Routed:
    """What a stack of L gates did with N tokens, one document after another.

    logits [L, N, E] with a gradient, reference [L, N, E] of the frozen gates on the same hidden states, experts
    [L, N, K] as chosen (best first), bias [L, 1, E] where the family has one, segments [N] document of each token.
    """

    logits: Tensor
    reference: Tensor
    experts: Tensor
    bias: Tensor | None
    segments: Tensor


_MODEL_ALONE = replace(Objective(), trust=0.0, reuse=0.0, smooth=0.0, lag=0.0, window=0.0)
PRESETS = {
    "remoe": Objective(),
    "no-trust": Objective(trust=0.0),  # the paper's ablation
    "ce-only": _MODEL_ALONE,  # the paper's control
    "cache": replace(_MODEL_ALONE, ce=0.0, lm_kl=1.0, miss=0.1),  # the deployed cache against the whole model's output
}


def layer_terms(objective: Objective, router: RouterConfig, routed: Routed) -> dict[str, Tensor]:
    """Every layer term whose weight is not 0, unweighted: [L] each."""
    o, segments = objective, routed.segments
    terms: dict[str, Tensor] = {}
    log_p = log_distribution(router, routed.logits, o.sharpen)
    if o.trust:
        terms["trust"] = losses.trust_loss(log_p, log_distribution(router, routed.reference, o.sharpen))
    if o.smooth:
        terms["smooth"] = losses.smooth_loss(log_p, segments)
    if o.lag:
        terms["lag"] = losses.lag_loss(log_p, segments, o.lags)
    if o.window:
        terms["window"] = losses.window_loss(log_p.exp(), segments, o.window_size)
    if not (o.reuse or o.margin or o.miss):
        return terms
    chosen = as_mask(routed.experts, router.num_experts)
    held = None
    if o.margin or o.miss or o.reuse_target == "cache":
        held = lru_contents(routed.experts, segments, router.num_experts, o.slots(router))
    if o.reuse:
        target = held if o.reuse_target == "cache" and held is not None else losses.previous_sets(chosen)
        terms["reuse"] = losses.reuse_loss(log_p.exp(), target, segments, router.top_k)
    if held is not None and (o.margin or o.miss):
        values = _in_deviations(router, routed, _sorted_by(o, router, routed, held))
        if o.margin:
            terms["margin"] = losses.margin_loss(
                values, chosen, held, segments, o.margin_gap, o.margin_reach, o.margin_pairs
            )
        if o.miss:
            terms["miss"] = losses.miss_loss(values, held, segments, router.top_k, o.miss_softness)
    return terms


def combine(objective: Objective, terms: dict[str, Tensor], alpha: float) -> Tensor:
    """The weighted sum of layer terms, averaged over layers: a scalar."""
    assert terms, "a combination of no terms"
    total = torch.zeros_like(next(iter(terms.values())))
    strength = total.new_tensor(objective.layer_strength) if objective.layer_strength else 1.0
    for name, value in terms.items():
        factor = alpha * strength if name in LOCALITY else 1.0
        total = total + getattr(objective, name) * factor * value
    return total.mean()


def routing_numbers(router: RouterConfig, routed: Routed, slots: int) -> dict[str, float]:
    """What the log shows: eor, misses per token (all layers, LRU, cold at each document) and changed choices.

    `changed` is the share of chosen experts that the frozen gates would not have chosen.
    """
    with torch.no_grad():
        chosen = as_mask(routed.experts, router.num_experts)
        stock = as_mask(choose(router, routed.reference, routed.bias), router.num_experts)
        held = lru_contents(routed.experts, routed.segments, router.num_experts, slots)
        overlap = expert_overlap(chosen, routed.segments).mean()
        return {
            "eor": float(overlap) if overlap.isfinite() else 0.0,
            "misses_per_token": float(misses(routed.experts, held).sum(0).double().mean()),
            "changed": 1.0 - float((chosen & stock).sum()) / float(chosen.sum()),
        }


def _sorted_by(objective: Objective, router: RouterConfig, routed: Routed, held: Tensor) -> Tensor:
    """The values that the top-k sorted by, [L, N, E], with the prior's bias where it was active."""
    prior = objective.cache_prior(router)
    if prior is None:
        return order_values(router, routed.logits, routed.bias)
    biases = [None] * len(held) if routed.bias is None else list(routed.bias[:, 0])
    layers = zip(routed.logits, biases, held, strict=True)
    biased = [biased_logits(router, z, bias, routed.segments, prior, inside) for z, bias, inside in layers]
    return order_values(router, torch.stack(biased), routed.bias)


def _in_deviations(router: RouterConfig, routed: Routed, values: Tensor) -> Tensor:
    """In units that mean the same for flat and for peaked gates."""
    unit = order_values(router, routed.reference, routed.bias).detach().std(-1).mean(-1)
    return values / unit.clamp_min(1e-6)[:, None, None]
