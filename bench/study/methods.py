"""The methods of the study, each with the strengths at which it is tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from remoe.cache_model import Prior
from remoe.objective import Objective
from runtime.cache_prior import CachePrior

_PUBLISHED = Objective()
_NO_LOCALITY = replace(_PUBLISHED, reuse=0.0, smooth=0.0, lag=0.0, window=0.0)
_ANCHORED = replace(_NO_LOCALITY, ce=0.0, trust=0.0, lm_kl=1.0)


@dataclass(frozen=True)
class Method:
    """One way to a router: `objective` None leaves the stock one. `slots`: the cache size that the objective knows of,
    0 for those that know none. `prior` is the strength of cache-prior routing while measuring.
    """

    name: str
    strength: float
    objective: Objective | None = None
    prior: float = 0.0
    slots: int = 0

    @property
    def key(self) -> str:
        """Tells this point from all others but for the seed."""
        return f"{self.name}/{self.strength:g}" + (f"/{self.slots}" if self.slots else "")

    def rule(self) -> Prior | None:
        """Cache-prior while measuring; the slots are those measured."""
        return Prior(CachePrior(self.prior), 0) if self.prior else None


@dataclass(frozen=True)
class Strengths:
    """How strongly each method is tried, on one model."""

    remoe: tuple[float, ...]  # factor on all published locality terms
    miss: tuple[float, ...]  # weight of the miss loss, which has a natural scale
    prior: tuple[float, ...]


def methods(strengths: Strengths, slots: tuple[int, ...]) -> Iterator[Method]:
    """All of them, the plain ones first; `slots` are the cache sizes for which routers are tuned."""
    yield Method("stock", 0.0)
    for strength in strengths.prior:
        yield Method("cache-prior", strength, prior=strength)
    yield Method("CE only", 1.0, replace(_NO_LOCALITY, trust=0.0))
    for strength in strengths.remoe:
        yield Method("ReMoE", strength, _scaled(_PUBLISHED, strength))
    yield Method("ReMoE without Trust", strengths.remoe[0], _scaled(replace(_PUBLISHED, trust=0.0), strengths.remoe[0]))
    middle = strengths.remoe[len(strengths.remoe) // 2]
    yield Method("ReMoE, output anchor", middle, _scaled(replace(_PUBLISHED, ce=0.0, trust=0.0, lm_kl=1.0), middle))
    for size in slots:
        target = replace(_scaled(_PUBLISHED, middle), reuse_target="cache", cache_slots=size)
        yield Method("ReMoE, cache as target", middle, target, slots=size)
        yield Method("margin loss", middle, replace(_NO_LOCALITY, margin=middle, cache_slots=size), slots=size)
        for strength in strengths.miss:
            objective = replace(_ANCHORED, miss=strength, cache_slots=size)
            yield Method("miss loss, output anchor", strength, objective, slots=size)
        for strength in strengths.prior[1:]:  # a weak prior alone costs next to nothing: it needs no tuning
            published = replace(_scaled(_PUBLISHED, strengths.remoe[0]), cache_slots=size, prior=strength)
            yield Method("ReMoE, with the prior", strength, published, prior=strength, slots=size)
            for name, anchor in (("all together", _NO_LOCALITY), ("all together, output anchor", _ANCHORED)):
                objective = replace(anchor, miss=strengths.miss[0], cache_slots=size, prior=strength)
                yield Method(name, strength, objective, prior=strength, slots=size)


def _scaled(objective: Objective, factor: float) -> Objective:
    terms = {name: factor * getattr(objective, name) for name in ("reuse", "smooth", "lag", "window")}
    return replace(objective, **terms)
