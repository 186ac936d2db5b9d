"""The methods of the study, each with the strengths at which it is tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from remoe.objective import PRESETS, Objective
from runtime.cache_prior import CachePrior

_PUBLISHED = Objective(reuse=1.0, smooth=0.05, lag=0.05, window=0.05)  # strength 1; the default is 0.3
_NO_LOCALITY = replace(_PUBLISHED, reuse=0.0, smooth=0.0, lag=0.0, window=0.0)
DECIDING = ("CE only", "ReMoE", "ReMoE without Trust")  # these run with every seed


@dataclass(frozen=True)
class Method:
    """One way to a router: `objective` None leaves the stock one. `slots`: the cache size that the objective knows of,
    0 for those that know none. `prior` is active while measuring, and `policy` that of the measured cache.
    """

    name: str
    strength: float
    objective: Objective | None = None
    prior: CachePrior | None = None
    slots: int = 0
    policy: Literal["lru", "gate"] = "lru"

    @property
    def key(self) -> str:
        """Tells this point from all others but for the seed."""
        return f"{self.name}/{self.strength:g}" + (f"/{self.slots}" if self.slots else "")


@dataclass(frozen=True)
class Strengths:
    """How strongly each method is tried, on one model."""

    remoe: tuple[float, ...]  # factor on all published locality terms
    openings: tuple[float, ...]  # the same where something else is changed, or weight of the term in their place
    miss: tuple[float, ...]  # weight of the miss loss, which has a natural scale
    prior: tuple[float, ...]  # of the published rule
    energy: tuple[float, ...]  # of the rule by energy
    active: tuple[float, ...]  # of the published rule while a router is tuned with it, and measured with it
    after: tuple[float, ...]  # of the rule by energy, over routers that were tuned without it


def methods(strengths: Strengths, slots: tuple[int, ...], layers: int) -> Iterator[Method]:
    """All of them, the plain ones first; `slots` are the cache sizes for which routers are tuned, `layers` those with
    experts.
    """
    yield Method("stock", 0.0)
    yield Method("gate-aware cache", 0.0, policy="gate")
    for strength in strengths.prior:
        yield Method("cache-prior", strength, prior=CachePrior(strength))
        yield Method("cache-prior, gate-aware cache", strength, prior=CachePrior(strength), policy="gate")
    for strength in strengths.energy:
        prior = CachePrior(strength, scaling="energy")
        yield Method("by energy", strength, prior=prior)
        yield Method("by energy, gate-aware cache", strength, prior=prior, policy="gate")
    yield Method("CE only", 1.0, PRESETS["ce-only"])
    for strength in strengths.remoe:
        yield Method("ReMoE", strength, scaled(_PUBLISHED, strength))
    falling = tuple(2 * (layers - number) / (layers + 1) for number in range(layers))  # its mean is 1
    without_trust, anchored = replace(_PUBLISHED, trust=0.0), replace(_PUBLISHED, ce=0.0, trust=0.0, lm_kl=1.0)
    weakest = strengths.remoe[0]
    yield Method("ReMoE without Trust", weakest, scaled(without_trust, weakest))
    for strength in strengths.openings:
        yield Method("ReMoE, output anchor", strength, scaled(anchored, strength))
        for where, factors in (("early", falling), ("late", falling[::-1])):
            stronger = replace(scaled(_PUBLISHED, strength), layer_strength=factors)
            yield Method(f"ReMoE, stronger in {where} layers", strength, stronger)
        for size in slots:
            target = replace(scaled(_PUBLISHED, strength), reuse_target="cache", cache_slots=size)
            yield Method("ReMoE, cache as target", strength, target, slots=size)
            margin = replace(_NO_LOCALITY, margin=strength, cache_slots=size)
            yield Method("margin loss", strength, margin, slots=size)
    for size in slots:
        for strength in strengths.miss:
            cached = replace(PRESETS["cache"], miss=strength, cache_slots=size)
            yield Method("miss loss, output anchor", strength, cached, slots=size)
        for strength in strengths.active:
            active = replace(scaled(_PUBLISHED, weakest), cache_slots=size, prior=strength)
            yield Method("ReMoE, with the prior", strength, active, CachePrior(strength), slots=size)
    early = replace(scaled(_PUBLISHED, weakest), layer_strength=falling)
    for strength in strengths.after:
        rule = CachePrior(strength, scaling="energy")
        yield Method("stronger in early layers, then by energy", strength, early, rule, policy="gate")
        for size in slots:
            cached = replace(PRESETS["cache"], miss=strengths.miss[-1], cache_slots=size)
            yield Method("miss loss, then by energy", strength, cached, rule, slots=size, policy="gate")


def scaled(objective: Objective, factor: float) -> Objective:
    """All published locality terms times a factor."""
    terms = {name: factor * getattr(objective, name) for name in ("reuse", "smooth", "lag", "window")}
    return replace(objective, **terms)
