"""What a router costs and saves: quality of the language model against the stock router, and what its routing reads.

Every window of text is read by the engine itself, once per variant, as a request of its own. Stock and tuned routers
read a window at once. Cache-prior routing depends on the cache, so its windows are read token by token, closed loop,
against a cache of the judged size that starts empty with each window; its books are those of the running cache, so an
engine with that many slots would choose the same experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from remoe.metrics import SEGMENT, Locality, locality
from remoe.pools import PolicyPool
from remoe.record import choice_bias, info_of, watching
from remoe.simulate import BELADY, Result, Setting, share_of_optimum, simulate
from remoe.trace import Block, Origin, Trace
from runtime.cache_prior import CachePrior, CachePriorRouter
from runtime.config import RouterConfig
from runtime.demand import Demand
from runtime.engine import Engine
from runtime.errors import UsageError
from runtime.policies import GATE, Array, make_policy
from runtime.router import Routed, Router

STOCK = "base"
_HEAD_TOKENS = 64  # logits of a whole window over a large vocabulary would take hundreds of megabytes


@dataclass(frozen=True)
class Variant:
    """A router by name or path, routed by the stock rule or, with a prior, towards a cache of `slots` per layer."""

    router: str = STOCK
    prior: CachePrior | None = None
    slots: int | None = None

    @property
    def stock(self) -> bool:
        """The reference of all others."""
        return self.router == STOCK and self.prior is None


@dataclass
class Quality:
    """Sums over predicted tokens; `kl` is KL(stock || variant) of the next token's distribution, in nats."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    same_best: int = 0

    def add(self, logits: torch.Tensor, stock: torch.Tensor, targets: torch.Tensor) -> None:
        """logits and stock [S, V] fp32, targets [S]."""
        ours, theirs = logits.double().log_softmax(-1), stock.double().log_softmax(-1)
        self.tokens += len(targets)
        self.nll -= float(ours.gather(-1, targets[:, None]).sum())
        self.kl += float((theirs.exp() * (theirs - ours)).sum())
        self.same_best += int((ours.argmax(-1) == theirs.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def mean_kl(self) -> float:
        return self.kl / self.tokens

    @property
    def top1_agreement(self) -> float:
        return self.same_best / self.tokens


@dataclass(frozen=True)
class CacheFigures:
    """What a variant's routing does to a cache of this size."""

    result: Result
    share: float  # of its misses, those that the optimum has as well

    @property
    def slots(self) -> int:
        return self.result.setting.slots_per_layer or 0


@dataclass(frozen=True)
class Evaluation:
    """One variant. `route_agreement`: share of its experts that the stock run chose for the same token and layer."""

    variant: Variant
    quality: Quality
    locality: Locality
    route_agreement: float
    caches: tuple[CacheFigures, ...]
    trace: Trace = field(repr=False)


@dataclass(frozen=True)
class EvalOptions:
    """`slots`: sizes of the judged caches, per layer, under `policy`, cold for every window."""

    slots: tuple[int, ...]
    policy: str = "lru"
    segment: int = SEGMENT

    def __post_init__(self) -> None:
        if not self.slots:
            raise UsageError("no size of cache to judge: give --slots")
        if self.segment < 1:
            raise UsageError(f"--segment {self.segment}: expected at least 1 token")


class PooledCache:
    """The books of an expert cache without its bytes: what cache-prior routing asks when a size is judged."""

    def __init__(self, layers: Sequence[int], rules: RouterConfig, slots: int, policy: str) -> None:
        self._place = {layer: place for place, layer in enumerate(layers)}
        self._rules, self._slots, self._policy = rules, slots, policy
        self.clear()

    def clear(self) -> None:
        """The next request finds nothing."""
        self._demand = Demand(len(self._place), self._rules)
        keys = range(self._rules.num_experts)
        self._pools = [PolicyPool(self._slots, make_policy(self._policy, keys, row)) for row in self._demand.values]

    def held(self, layer: int) -> Array:
        """As ExpertCache.held."""
        held = np.zeros(self._rules.num_experts, dtype=bool)
        held[list(self._pools[self._place[layer]].resident)] = True
        return held

    def full(self, layer: int) -> bool:
        """As ExpertCache.full."""
        return self._pools[self._place[layer]].full

    def request(self, layer: int, routed: Routed) -> None:
        """The layer needs the experts of one token."""
        place, experts = self._place[layer], routed.experts.cpu().numpy()
        self._demand.see(place, routed.logits.cpu().numpy(), experts)
        self._pools[place].request(experts[0].tolist())


class _Judged(CachePriorRouter):
    """Cache-prior routing whose cache is a PooledCache, told of every choice and emptied for every sequence."""

    def __init__(self, router: Router, prior: CachePrior, cache: PooledCache) -> None:
        self._books = cache
        super().__init__(router, cache, prior)

    def begin(self) -> None:
        super().begin()
        self._books.clear()

    def route(self, layer: int, h: torch.Tensor) -> Routed:
        routed = super().route(layer, h)
        self._books.request(layer, routed)
        return routed


def evaluate(
    engine: Engine, variants: Sequence[Variant], windows: Sequence[Sequence[int]], source: Origin, options: EvalOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Evaluation]:  # fmt: skip
    """Judge variants on windows of token ids (at least two each). The first result is that of the stock router.

    Raises UsageError for a router or a size that cannot be, before anything is run; the engine then routes as before.
    """
    before = engine.options
    try:
        runs = [_Run(engine, variant, options, source) for variant in _ordered(variants)]
        for number, window in enumerate(windows):
            stock: torch.Tensor | None = None
            for at, run in enumerate(runs, 1):
                states = run.read(number, window)
                stock = states if stock is None else stock
                _judge(engine, run.quality, states, stock, window)
                progress(number * len(runs) + at, len(runs) * len(windows))
        traces = [run.trace() for run in runs]
    finally:
        engine.use_router(before.router, before.prior)
    return [_evaluation(run, trace, traces[0], options) for run, trace in zip(runs, traces, strict=True)]


def _ordered(variants: Sequence[Variant]) -> list[Variant]:
    """The stock router first, every other once."""
    return [Variant(), *(variant for variant in dict.fromkeys(variants) if not variant.stock)]


class _Run:
    """One variant on its way through the windows."""

    def __init__(self, engine: Engine, variant: Variant, options: EvalOptions, source: Origin) -> None:
        """Loads the router and checks everything. Raises UsageError."""
        engine.use_router(variant.router)
        info = info_of(engine, "teacher-forced", source)
        for slots in options.slots if variant.slots is None else (variant.slots,):
            Setting(options.policy, slots, prior=variant.prior).check(info)
        self.variant, self.quality = variant, Quality()
        self._engine, self._blocks, self._router = engine, list[Block](), engine.decoder.router
        self._logits = options.policy == GATE  # the books go by them
        self._info, self._bias = info, choice_bias(engine)
        if variant.prior is not None:
            cache = PooledCache(info.moe_layers, info.rules, variant.slots or 0, options.policy)
            self._router = _Judged(engine.router, variant.prior, cache)
            self._info = replace(info, routing=f"{variant.prior} slots={variant.slots} policy={options.policy}")

    def read(self, request: int, window: Sequence[int]) -> torch.Tensor:
        """What the head sees after every token of the window: [S, H]."""
        decoder = self._engine.decoder
        decoder.router = self._router
        with watching(self._engine, logits=self._logits) as watcher:
            decoder.rewind()
            ids = torch.tensor(window)
            parts = ids.split(1) if self.variant.prior is not None else [ids]
            states = torch.cat([decoder.states(part) for part in parts])
            block = watcher.take(request, window, prompt_tokens=0)
        assert block is not None, "a window was read, but no router saw it"
        self._blocks.append(block)
        return states

    def trace(self) -> Trace:
        """The routing of all windows."""
        return Trace.from_blocks(self._info, self._blocks, self._bias)


def _judge(engine: Engine, quality: Quality, states: torch.Tensor, stock: torch.Tensor, window: Sequence[int]) -> None:
    targets = torch.tensor(window[1:])
    for at in range(0, len(targets), _HEAD_TOKENS):
        part = slice(at, min(at + _HEAD_TOKENS, len(targets)))
        logits = engine.decoder.head(states[part])
        reference = logits if states is stock else engine.decoder.head(stock[part])
        quality.add(logits.cpu(), reference.cpu(), targets[part])


def _evaluation(run: _Run, trace: Trace, reference: Trace, options: EvalOptions) -> Evaluation:
    sizes = options.slots if run.variant.slots is None else (run.variant.slots,)
    caches = []
    for slots in sizes:
        result, best = (simulate(trace, Setting(policy, slots)) for policy in (options.policy, BELADY))
        caches.append(CacheFigures(result, share_of_optimum(result, best)))
    same = (trace.experts[..., :, None] == reference.experts[..., None, :]).sum()
    return Evaluation(
        variant=run.variant,
        quality=run.quality,
        locality=locality(trace, sizes[0], options.segment),
        route_agreement=float(same) / trace.experts.size,
        caches=tuple(caches),
        trace=trace,
    )
