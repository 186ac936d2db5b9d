"""Eviction policies. They differ only in order; the cache does the counting, the pinning and the evicting.

A key is anything hashable. `victim` gets the keys that must stay (pinned, or still being read).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Hashable
from typing import Protocol

from runtime.errors import UsageError


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

    def victim(self, keep: Container[Hashable]) -> Hashable | None:
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

    def victim(self, keep: Container[Hashable]) -> Hashable | None:
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

    def victim(self, keep: Container[Hashable]) -> Hashable | None:
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


POLICIES: dict[str, Callable[[], Policy]] = {"lru": LRU, "lfu": LFU, "lfru": LFRU, "fifo": FIFO}


def make_policy(name: str) -> Policy:
    """A fresh policy by name. Raises UsageError naming the known ones."""
    if name not in POLICIES:
        raise UsageError(f"unknown policy {name!r} (known: {', '.join(POLICIES)})")
    return POLICIES[name]()
