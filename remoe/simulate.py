"""Replays a routing trace through a cache of any size: how many experts would have been read.

The books are those of the running cache (runtime/cache.py), so an engine with the same slots, policy and requests
counts the same hits and misses. docs/traces.md says what is counted and how.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from remoe.pools import OptimalPool, PolicyPool, Slots
from remoe.prior_replay import PriorChooser
from remoe.trace import Trace, TraceInfo
from runtime.demand import Demand
from runtime.errors import BudgetError, UsageError
from runtime.policies import GATE, POLICIES, make_policy

if TYPE_CHECKING:
    from runtime.cache_prior import CachePrior  # which imports torch

Array = np.ndarray[Any, np.dtype[Any]]
BELADY = "belady"
SIMULATED = (*POLICIES, BELADY)


@dataclass(frozen=True)
class Setting:
    """A cache: a policy of the engine or "belady", and its slots, per layer or shared by all of them.

    `cold`: emptied before each request; otherwise only before the first. `prompt` "replay": prompts fill the cache as
    they do in the engine; "skip": only decode steps are requests, as in the paper's protocol. With `prior` tokens are
    routed again by the cache-prior rule from the recorded logits.
    """

    policy: str = "lru"
    slots_per_layer: int | None = None
    shared_slots: int | None = None
    cold: bool = True
    prompt: Literal["replay", "skip"] = "replay"
    prior: CachePrior | None = None

    def check(self, info: TraceInfo) -> None:
        """Raises UsageError for values that cannot be, BudgetError for fewer slots than a token needs."""
        if self.policy not in SIMULATED:
            raise UsageError(f"unknown policy {self.policy!r} (known: {', '.join(SIMULATED)})")
        if (self.slots_per_layer is None) == (self.shared_slots is None):
            raise UsageError("a cache has either slots per layer or slots that all layers share: give one of them")
        if self.prompt not in ("replay", "skip"):
            raise UsageError(f"unknown prompt {self.prompt!r} (known: replay, skip)")
        if self.prior is not None:
            self.prior.check(info.top_k)
            if self.policy == BELADY:
                raise UsageError(
                    "belady needs to know what will be asked for, but cache-prior routing decides that anew"
                )
        if self.slots_per_layer is not None and self.slots_per_layer < info.top_k:
            raise BudgetError(
                f"{self.slots_per_layer} slots per layer cannot hold the top {info.top_k} experts that a token needs: "
                f"--slots {info.top_k} or more"
            )
        cycle = len(info.moe_layers) * info.top_k
        if self.shared_slots is not None and self.shared_slots < cycle:
            raise BudgetError(
                f"a shared cache of {self.shared_slots} slots is smaller than one token cycle of {cycle} experts "
                f"({len(info.moe_layers)} layers x top {info.top_k}): --slots {cycle} or more"
            )


@dataclass(frozen=True, eq=False)
class Result:
    """What a cache did. `missed` uint8 [N, L]: experts that a decode step had to read, 0 in the rows of prompts.

    `prompt_hits` and `prompt_misses` int32 [requests, L] count distinct experts per chunk of a prompt. The figures are
    over decode steps alone. `experts` [N, L, K] were asked for; `agreement`, with a prior: the share of them that the
    router itself chooses.
    """

    setting: Setting
    missed: Array
    decode_tokens: int
    top_k: int
    expert_bytes: int
    prompt_hits: Array
    prompt_misses: Array
    experts: Array
    agreement: float | None = None

    @property
    def requests(self) -> int:
        """Distinct experts per layer and decode step, summed."""
        return self.decode_tokens * self.missed.shape[1] * self.top_k

    @property
    def misses(self) -> int:
        return int(self.missed.sum())

    @property
    def hits(self) -> int:
        return self.requests - self.misses

    @property
    def unique_hit_rate(self) -> float:
        """uHR of the paper: requests that found their expert in the cache."""
        return self.hits / self.requests

    @property
    def bytes(self) -> int:
        """Read in decode."""
        return self.misses * self.expert_bytes

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.decode_tokens

    @property
    def misses_by_layer(self) -> Array:
        """int64 [L]."""
        return self.missed.sum(axis=0, dtype=np.int64)

    @property
    def misses_by_token(self) -> Array:
        """int64 [N]."""
        return self.missed.sum(axis=1, dtype=np.int64)


def simulate(trace: Trace, setting: Setting) -> Result:
    """Raises UsageError for a setting that cannot be, or a trace that lacks what it needs."""
    setting.check(trace.info)
    if not trace.decode.any():
        raise UsageError("the trace has prompts only: record at least one decode step")
    if setting.policy == GATE and trace.logits is None:
        raise UsageError("the policy gate needs the logits of a trace: record it with `edge trace --logits`")
    if setting.prior is None:
        return _Replay(trace, setting, None).run()
    return _Replay(trace, setting, PriorChooser(trace, setting.prior, setting.shared_slots is not None)).run()


def share_of_optimum(result: Result, optimum: Result) -> float:
    """Misses that Belady's rule has as well: 1 is the best that a policy can do, for the recorded routing."""
    return optimum.misses / result.misses if result.misses else 1.0


class _Replay:
    """Walks through a trace. A key is layer position * E + expert; a step has one list of keys per layer."""

    def __init__(self, trace: Trace, setting: Setting, chooser: PriorChooser | None) -> None:
        self._trace, self._setting, self._chooser = trace, setting, chooser
        self._experts = chooser.experts if chooser else trace.experts  # those of a chooser change as it goes
        layers = len(trace.info.moe_layers)
        self._keys = (trace.experts + np.arange(layers)[:, None] * trace.info.num_experts).tolist()

    def run(self) -> Result:
        trace, cold = self._trace, self._setting.cold
        requests = [self._parts(rows) for rows in trace.request_rows()]
        missed = np.zeros(trace.experts.shape[:2], np.uint8)
        prompt = np.zeros((2, len(requests), missed.shape[1]), np.int32)
        pools = [] if cold else self._pools(requests)
        for number, (chunks, decode) in enumerate(requests):
            if cold:
                pools = self._pools(requests[number : number + 1])
            for rows, step in zip(chunks, map(self._chunk, chunks), strict=True):
                found = self._step(rows, pools, step)
                prompt[0, number] += [len(keys) for keys in step] - found
                prompt[1, number] += found
            if self._chooser:
                self._chooser.begin(range(decode.start - sum(map(len, chunks)), decode.start))
            for row in decode:
                keys = self._chooser.keys(row, pools) if self._chooser else self._keys[row]
                missed[row] = self._step(range(row, row + 1), pools, keys)
        return self._result(missed, prompt)

    def _step(self, rows: range, pools: Sequence[Slots], step: Iterable[list[int]]) -> Array:
        """Misses of each layer, one after the other; a step of a prompt has several rows."""
        found = []
        for layer, (pool, keys) in enumerate(zip(pools, step, strict=True)):
            if self._setting.policy == GATE:
                self._see(layer, slice(rows.start, rows.stop))
            found.append(pool.request(keys))
        return np.array(found)

    def _see(self, layer: int, rows: slice) -> None:
        """What ExpertCache.saw is told."""
        logits = self._trace.logits
        assert logits is not None, "a trace without logits was let in"
        self._demand.see(layer, logits[rows, layer], self._experts[rows, layer])

    def _result(self, missed: Array, prompt: Array) -> Result:
        info, chooser = self._trace.info, self._chooser
        agreement = chooser.agreement if chooser else None
        decoded = int(self._trace.decode.sum(dtype=np.int64))
        return Result(
            self._setting,
            missed,
            decoded,
            info.top_k,
            info.expert_bytes,
            prompt[0],
            prompt[1],
            self._experts,
            agreement,
        )

    def _parts(self, rows: range) -> tuple[list[range], range]:
        """Chunks of the prompt, and the decode steps."""
        first = rows.start + int((self._trace.decode[rows.start : rows.stop] == 0).sum())
        size = self._trace.info.prefill_chunk
        chunks = [range(at, min(at + size, first)) for at in range(rows.start, first, size)]
        return (chunks if self._setting.prompt == "replay" else []), range(first, rows.stop)

    def _chunk(self, rows: range) -> list[list[int]]:
        """What a chunk of a prompt asks for: its experts by last use; a lone token's in the router's order."""
        if len(rows) == 1:
            return self._keys[rows.start]
        step = []
        for layer in range(len(self._trace.info.moe_layers)):
            last_use = {key: row for row in rows for key in reversed(self._keys[row][layer])}
            step.append(sorted(last_use, key=last_use.__getitem__))
        return step

    def _pools(self, requests: Sequence[tuple[list[range], range]]) -> list[Slots]:
        """Empty slots, one per layer: the same one for all where they are shared."""
        setting, layers = self._setting, len(self._trace.info.moe_layers)
        shared = setting.shared_slots is not None
        slots = setting.shared_slots or setting.slots_per_layer or 0
        coming: list[list[Sequence[int]]] = [[] for _ in range(1 if shared else layers)]
        if setting.policy == BELADY:
            for chunks, decode in requests:
                for step in (*map(self._chunk, chunks), *(self._keys[row] for row in decode)):
                    for layer, keys in enumerate(step):
                        coming[0 if shared else layer].append(keys)
        self._demand = Demand(layers, self._trace.info.rules)
        values = self._demand.values.reshape(1 if shared else layers, -1)
        made = [self._slots(slots, asked, number, values[number]) for number, asked in enumerate(coming)]
        return made * layers if shared else made

    def _slots(self, slots: int, asked: list[Sequence[int]], number: int, demand: Array) -> Slots:
        if self._setting.policy == BELADY:
            return OptimalPool(slots, asked)
        keys = range(number * len(demand), (number + 1) * len(demand))
        return PolicyPool(slots, make_policy(self._setting.policy, keys, demand))
