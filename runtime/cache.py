"""The expert cache: a fixed number of slots, filled by the loader, emptied by a policy.

    resident + in flight + free = slots, always

`ExpertCache.fetch` hands out residents first, so that they are computed while the misses are read. Every expert of a
request is pinned from the moment it is asked for until the caller comes back for the next one.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from runtime.arena import Slots
from runtime.config import RouterConfig
from runtime.demand import Demand
from runtime.errors import EdgeError, ReadError
from runtime.loader import Load, Loader
from runtime.policies import GATE, Array, Policy, make_policy
from runtime.prefetch import Key, Prefetch

Scope = Literal["layer", "shared"]


@dataclass
class CacheStats:
    """What happened since the last `take_stats`, per layer where it is a list (index = position in moe_layers)."""

    hits: list[int]
    misses: list[int]
    experts: list[list[int]]  # ids asked for, in the order of the request (for one token the router's)
    missed: list[list[int]]  # those of them that had to be read
    evictions: int = 0
    bytes: int = 0  # read, padding included
    read_ns: int = 0  # summed over blobs: first chunk begun to last chunk checked
    queue_ns: int = 0  # summed over blobs: asked for to first chunk begun
    wait_ns: int = 0  # the decoder had nothing to compute
    prefetched: int = 0  # misses whose read began on a guess, before they were asked for
    wasted_bytes: int = 0  # of `bytes`: read for guesses that were wrong


class Pool:
    """Slots under one policy: those of one layer, or all of them."""

    def __init__(self, slots: Sequence[int], policy: Policy, held: Mapping[int, Array]) -> None:
        """`held`: by layer, a bool for each expert, kept true for those that are resident."""
        self.capacity = len(slots)
        self._held = held
        self.resident: dict[Key, int] = {}
        self.in_flight: dict[Key, int] = {}
        self.pinned: set[Key] = set()
        self._free = list(reversed(slots))
        self._policy = policy

    @property
    def full(self) -> bool:
        """Whether the next key takes the place of another."""
        return not self._free

    def pin(self, key: Key) -> int:
        """Keep a resident, count the use, and give its slot."""
        self.pinned.add(key)
        self._policy.touch(key)
        return self.resident[key]

    def unpin(self, key: Key) -> None:
        self.pinned.discard(key)

    def take(self, key: Key) -> tuple[int, int] | None:
        """A slot for a key that is to be read, pinned, and how many were evicted; None when every slot is pinned."""
        evicted = 0
        if not self._free:
            if not self._evict():
                return None
            evicted = 1
        slot = self._free.pop()
        self.in_flight[key] = slot
        self.pinned.add(key)
        self._policy.insert(key)
        return slot, evicted

    def exchange(self, key: Key, slot: int) -> None:
        """The key is read into a slot from beside this pool, which takes the place of its own."""
        self.in_flight[key] = slot

    def publish(self, key: Key) -> int:
        """The key's bytes have landed and are right."""
        slot = self.in_flight.pop(key)
        self.resident[key] = slot
        self._held[key[0]][key[1]] = True
        return slot

    def drop(self, key: Key) -> None:
        """The key's bytes did not come."""
        self._free.append(self.in_flight.pop(key))
        self.pinned.discard(key)
        self._policy.remove(key)

    def clear(self) -> None:
        """Forget every resident."""
        for key in [k for k in self.resident if k not in self.pinned]:
            self._remove(key)

    def check_integrity(self) -> None:
        """The equation of the cache, and no slot in two places."""
        used = [*self.resident.values(), *self.in_flight.values(), *self._free]
        assert len(used) == self.capacity == len(set(used)), "resident + in flight + free != slots"
        assert self.pinned <= self.resident.keys() | self.in_flight.keys(), "a key is pinned but not here"

    def _evict(self) -> bool:
        """The one door out."""
        victim = self._policy.victim(self.pinned)
        if victim is None:
            return False
        self._remove(victim)  # type: ignore[arg-type]
        return True

    def _remove(self, key: Key) -> None:
        self._policy.remove(key)
        self._held[key[0]][key[1]] = False
        self._free.append(self.resident.pop(key))


class ExpertCache:
    """Slots of an arena over the MoE layers of a model."""

    def __init__(
        self,
        moe_layers: Sequence[int],
        rules: RouterConfig,
        arena: Slots,
        loader: Loader,
        policy: str,
        scope: Scope,
        prefetch: int = 0,
    ) -> None:
        """The last `prefetch` slots are beside the cache, for guesses. Raises UsageError for an unknown policy."""
        self._arena, self._loader, self._rules, self._scope = arena, loader, rules, scope
        self._prefetch = Prefetch(arena, loader, range(arena.slots - prefetch, arena.slots)) if prefetch else None
        self._position = {layer: i for i, layer in enumerate(moe_layers)}
        self._stats = self._fresh_stats()
        self.use_policy(policy)

    @property
    def prefetches(self) -> bool:
        """Whether `prefetch` does anything."""
        return self._prefetch is not None

    def use_policy(self, policy: str) -> None:
        """Start empty under this policy; between requests only. Raises UsageError for one that is not known."""
        layers, beside = list(self._position), self._prefetch.slots if self._prefetch else set()
        slots = [slot for slot in range(self._arena.slots) if slot not in beside]
        self._held = {layer: np.zeros(self._rules.num_experts, dtype=bool) for layer in layers}
        self._demand, self._by_demand = Demand(len(layers), self._rules), policy == GATE
        if self._scope == "shared":
            self._pools = dict.fromkeys(layers, self._pool(slots, policy, layers))
            return
        each = len(slots) // len(layers)
        ranges = (slots[i * each : (i + 1) * each] for i in range(len(layers)))
        self._pools = {layer: self._pool(own, policy, [layer]) for layer, own in zip(layers, ranges, strict=True)}

    def _pool(self, slots: Sequence[int], policy: str, layers: Sequence[int]) -> Pool:
        keys = [(layer, expert) for layer in layers for expert in range(self._rules.num_experts)]
        first = self._position[layers[0]]
        demand = self._demand.values[first : first + len(layers)].reshape(-1)  # a view: it is looked at later
        return Pool(slots, make_policy(policy, keys, demand), self._held)

    def saw(self, layer: int, logits: torch.Tensor, experts: torch.Tensor) -> None:
        """What the gate of a layer gave the experts for S tokens [S, E], and which were chosen [S, K]; to be told
        before these are fetched. Only the gate-aware policy listens.
        """
        if self._by_demand:
            self._demand.see(self._position[layer], logits.cpu().numpy(), experts.cpu().numpy())

    def fetch(self, layer: int, experts: Sequence[int]) -> Request:
        """Ask for distinct experts of one layer; reads begin at once. Use as a context manager and iterate.

        Iterating yields (expert, its fp16 values), residents first, then each miss as it lands; the tensor may be used
        until the next one is asked for. Raises ReadError when a blob cannot be read; the cache stays whole.
        """
        return Request(
            self._pools[layer],
            self._arena,
            self._loader,
            self._prefetch,
            self._stats,
            self._position[layer],
            layer,
            experts,
        )

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read those of a layer's experts, most likely first, that are not here, before anybody asks."""
        if self._prefetch is not None:
            held = self._held[layer]
            self._prefetch.start(layer, [expert for expert in experts if not held[expert]])

    def take_stats(self) -> CacheStats:
        """What happened since the last call."""
        stats, self._stats = self._stats, self._fresh_stats()
        if self._prefetch is not None:
            counts = self._prefetch.take_counts()
            stats.prefetched, stats.wasted_bytes = counts.right, counts.wasted_bytes
            stats.bytes += counts.wasted_bytes
        return stats

    def clear(self) -> None:
        """Empty the cache: the next request is a cold one."""
        for pool in set(self._pools.values()):
            pool.clear()
        self._demand.clear()

    def held(self, layer: int) -> Array:
        """Which experts of a layer are in the cache now: bool [E], not to be changed."""
        return self._held[layer]

    def full(self, layer: int) -> bool:
        """Whether no slot is free that a layer's expert could be read into."""
        return self._pools[layer].full

    def check_integrity(self) -> None:
        """Check the equation in every pool; for tests and after faults."""
        for pool in set(self._pools.values()):
            pool.check_integrity()
        if self._prefetch is not None:
            self._prefetch.check_integrity()

    def _fresh_stats(self) -> CacheStats:
        layers = len(self._position)
        return CacheStats(
            hits=[0] * layers,
            misses=[0] * layers,
            experts=[[] for _ in range(layers)],
            missed=[[] for _ in range(layers)],
        )


@dataclass(eq=False)
class Request:
    """Experts of one layer on their way to the caller; made by ExpertCache.fetch."""

    pool: Pool
    arena: Slots
    loader: Loader
    prefetch: Prefetch | None
    stats: CacheStats
    position: int
    layer: int
    experts: Sequence[int]
    _ready: deque[tuple[int, int]] = field(default_factory=deque)
    _waiting: deque[int] = field(default_factory=deque)
    _leaving: deque[int] = field(default_factory=deque)  # experts in the order in which they give their slots up
    _computed: set[int] = field(default_factory=set)
    _outstanding: int = 0
    _done: queue.SimpleQueue[Load] = field(default_factory=queue.SimpleQueue)

    def __enter__(self) -> Request:
        for expert in self.experts:
            key = (self.layer, expert)
            if key in self.pool.resident:
                self._ready.append((expert, self.pool.pin(key)))
            else:
                self._waiting.append(expert)
        if self.prefetch is not None:
            self.prefetch.keep(self.layer, self._waiting)
        self._leaving.extend([*(expert for expert, _ in self._ready), *self._waiting])
        self.stats.hits[self.position] += len(self._ready)
        self.stats.misses[self.position] += len(self._waiting)
        self.stats.experts[self.position] += self.experts
        self.stats.missed[self.position] += self._waiting
        try:
            self._issue()
        except EdgeError:
            self.__exit__()
            raise
        return self

    def __iter__(self) -> Iterator[tuple[int, torch.Tensor]]:
        while self._ready:
            yield from self._hand_out(*self._ready.popleft())
        while self._outstanding:
            yield from self._hand_out(*self._land())
        assert not self._waiting, "a request ran out of slots with nothing pinned"

    @contextmanager
    def residents(self) -> Iterator[list[tuple[int, torch.Tensor]]]:
        """All experts that are here, to be computed together; iterating afterwards yields the others."""
        ready = [self._ready.popleft() for _ in range(len(self._ready))]
        try:
            yield [(expert, self.arena.tensors[slot]) for expert, slot in ready]
        finally:
            for _, slot in ready:
                self.arena.used(slot)
        for expert, _ in ready:
            self._release(expert)

    def __exit__(self, *_: object) -> None:
        """Unpin everything; reads that nobody waits for any more are let land, so that no slot is lost."""
        while self._outstanding and not self.loader.dead:
            try:
                self._land()
            except ReadError:  # the caller has its own error by now; the slot is free again
                continue
        for expert in self.experts:
            if (self.layer, expert) in self.pool.resident:
                self.pool.unpin((self.layer, expert))

    def _hand_out(self, expert: int, slot: int) -> Iterator[tuple[int, torch.Tensor]]:
        try:
            yield expert, self.arena.tensors[slot]
        finally:  # also when the caller gives up: a GPU may have been asked to read the slot
            self.arena.used(slot)
        self._release(expert)

    def _issue(self) -> None:
        """Start as many of the waiting reads as there are slots for."""
        while self._waiting:
            key = (self.layer, self._waiting[0])
            taken = self.pool.take(key)
            if taken is None:
                return
            slot, evicted = taken
            self.stats.evictions += evicted
            self._waiting.popleft()
            guessed = self.prefetch.claim(key, slot, self._done) if self.prefetch else None
            try:
                if guessed is not None:
                    self.pool.exchange(key, guessed)
                else:
                    self.arena.begin_write(slot)
                    self.loader.submit(*key, self.arena.views[slot], self._done)
            except EdgeError:
                self.pool.drop(key)
                raise
            self._outstanding += 1

    def _release(self, expert: int) -> None:
        """The caller is done with an expert: its slot may go to the next read.

        Slots are given up in the order of the request, whichever read landed first: what a request for more experts
        than there are slots leaves in the cache then does not depend on the disk's timing.
        """
        self._computed.add(expert)
        while self._leaving and self._leaving[0] in self._computed:
            self.pool.unpin((self.layer, self._leaving.popleft()))
            self._issue()

    def _land(self) -> tuple[int, int]:
        """Wait for the next read to end and publish it. Raises ReadError, after freeing the slot, when it failed."""
        begin = time.monotonic_ns()
        load = self.loader.wait(self._done)
        stats, key = self.stats, (self.layer, load.expert)
        stats.wait_ns += time.monotonic_ns() - begin
        stats.read_ns += load.finished_ns - load.started_ns
        stats.queue_ns += load.started_ns - load.submitted_ns
        stats.bytes += len(load.view)
        self._outstanding -= 1
        if load.error:
            self.pool.drop(key)
            raise load.error
        slot = self.pool.publish(key)
        self.arena.landed(slot)
        return load.expert, slot
