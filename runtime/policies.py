"""Eviction policies. They differ only in order; the cache does the counting, the pinning and the evicting.

A key is anything hashable. `victim` gets the keys that must stay (pinned, or still being read).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from runtime.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]


class Policy(Protocol):
    """The order in which residents leave."""

    def insert(self, key: Hashable) -> None:
        """A key takes a slot."""
        ...

    def touch(self, key: Hashable) -> None:
        """A resident key is used again."""
        ...

    def remove(self, key: Hashable) -> None:
        """A key gives its slot back."""
        ...

    def victim(self, keep: Collection[Hashable]) -> Hashable | None:
        """The key that should leave next, or None when all must stay."""
        ...


class LRU:
    """Least recently used."""

    def __init__(self) -> None:
        self._order: OrderedDict[Hashable, None] = OrderedDict()

    def insert(self, key: Hashable) -> None:
        self._order[key] = None

    def touch(self, key: Hashable) -> None:
        self._order.move_to_end(key)

    def remove(self, key: Hashable) -> None:
        del self._order[key]

    def victim(self, keep: Collection[Hashable]) -> Hashable | None:
        return next((key for key in self._order if key not in keep), None)


class FIFO(LRU):
    """First in, first out: a use changes nothing."""

    def touch(self, key: Hashable) -> None:
        pass


class _Counting:
    """Keeps, for every resident, how often and when it was used; a subclass turns that into a score."""

    def __init__(self) -> None:
        self._uses: dict[Hashable, int] = {}
        self._last: dict[Hashable, int] = {}
        self._now = 0

    def insert(self, key: Hashable) -> None:
        self._uses[key] = 0
        self.touch(key)

    def touch(self, key: Hashable) -> None:
        self._now += 1
        self._uses[key] += 1
        self._last[key] = self._now

    def remove(self, key: Hashable) -> None:
        del self._uses[key], self._last[key]

    def victim(self, keep: Collection[Hashable]) -> Hashable | None:
        candidates = [key for key in self._uses if key not in keep]
        return min(candidates, key=self._score, default=None)

    def _score(self, key: Hashable) -> tuple[float, int]:
        raise TypeError("a counting policy defines its score")


class LFU(_Counting):
    """Least often used since it became resident; of equals, the least recently used."""

    def _score(self, key: Hashable) -> tuple[float, int]:
        return self._uses[key], self._last[key]


class LFRU(_Counting):
    """Lowest uses / (now - last use + 1): frequency that fades with age; of equals, the least recently used."""

    def _score(self, key: Hashable) -> tuple[float, int]:
        return self._uses[key] / (self._now - self._last[key] + 1), self._last[key]


class GateAware:
    """Least in demand, by what the gate gave an expert and how often it was used (runtime/demand.py)."""

    def __init__(self, keys: Sequence[Hashable], demand: Array) -> None:
        """`demand` [len(keys)] is looked at anew for every victim."""
        self._keys, self._demand = keys, demand
        self._place = {key: place for place, key in enumerate(keys)}
        self._absent = np.ones(len(keys), dtype=bool)

    def insert(self, key: Hashable) -> None:
        self._absent[self._place[key]] = False

    def touch(self, key: Hashable) -> None:
        pass

    def remove(self, key: Hashable) -> None:
        self._absent[self._place[key]] = True

    def victim(self, keep: Collection[Hashable]) -> Hashable | None:
        demand = np.where(self._absent, np.inf, self._demand)
        demand[[self._place[key] for key in keep]] = np.inf
        least = int(demand.argmin())
        return None if demand[least] == np.inf else self._keys[least]


GATE = "gate"
_PLAIN: dict[str, Callable[[], Policy]] = {"lru": LRU, "lfu": LFU, "lfru": LFRU, "fifo": FIFO}
POLICIES = (*_PLAIN, GATE)


def make_policy(name: str, keys: Sequence[Hashable], demand: Array) -> Policy:
    """A fresh policy by name, for experts with these keys; `demand` [len(keys)] of each of them is kept by the caller.

    Raises UsageError naming the known ones.
    """
    if name == GATE:
        return GateAware(keys, demand)
    if name not in _PLAIN:
        raise UsageError(f"unknown policy {name!r} (known: {', '.join(POLICIES)})")
    return _PLAIN[name]()
