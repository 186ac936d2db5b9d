"""Slots without bytes: the books of runtime.cache.Pool and Request, and the best that any policy could do.

A request is what a layer asks for at once: the experts of one token, or all that a chunk of a prompt needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from runtime.policies import Policy

NEVER = 1 << 62


class Slots(Protocol):
    """Something that counts misses."""

    resident: set[int]

    @property
    def full(self) -> bool:
        """Whether the next key takes the place of another."""
        ...

    def request(self, keys: Sequence[int]) -> int:
        """Distinct keys that are needed together; returns how many were not there."""
        ...


class PolicyPool:
    """Slots under a policy, exactly as the running cache keeps them.

    Hits are used in the order of the request, then misses take slots in that order. Experts of the request stay, until
    it needs more slots than there are: then they leave in the order in which they were computed, hits first.
    """

    def __init__(self, slots: int, policy: Policy) -> None:
        self.resident: set[int] = set()
        self._slots, self._policy = slots, policy

    @property
    def full(self) -> bool:
        return len(self.resident) == self._slots

    def request(self, keys: Sequence[int]) -> int:
        resident, touch = self.resident, self._policy.touch
        missing = []
        for key in keys:
            if key in resident:
                touch(key)
            else:
                missing.append(key)
        if missing:
            self._load(keys, missing)
        return len(missing)

    def _load(self, keys: Sequence[int], missing: list[int]) -> None:
        resident, policy = self.resident, self._policy
        keep = set(keys)
        computed: deque[int] | None = None  # made when a request turns out to be larger than the cache
        for key in missing:
            if len(resident) == self._slots:
                victim = policy.victim(keep)
                if victim is None:
                    computed = computed or deque([*(k for k in keys if k in resident and k not in missing), *missing])
                    victim = computed.popleft()
                policy.remove(victim)
                resident.remove(victim)  # type: ignore[arg-type]
            policy.insert(key)
            resident.add(key)


class OptimalPool:
    """Belady's rule with the future known: what is needed last leaves first, what is needed now stays.

    Experts of a request are in the cache together, as they are in the running one; under that rule no policy misses
    less. After a request for more experts than there are slots those stay that are needed soonest.
    """

    def __init__(self, slots: int, requests: Iterable[Sequence[int]]) -> None:
        """`requests`: all that will be asked for, in that order."""
        self.resident: set[int] = set()
        self._slots, self._now = slots, 0
        self._uses: dict[int, deque[int]] = {}
        self._next: dict[int, int] = {}
        for time, keys in enumerate(requests):
            for key in keys:
                self._uses.setdefault(key, deque()).append(time)

    @property
    def full(self) -> bool:
        return len(self.resident) == self._slots

    def request(self, keys: Sequence[int]) -> int:
        resident, coming = self.resident, self._next
        misses = 0
        for key in keys:
            uses = self._uses[key]
            if uses.popleft() != self._now:
                raise ValueError("the requests are not those that were announced")
            coming[key] = uses[0] if uses else NEVER
            if key not in resident:
                misses += 1
        self._now += 1
        if misses:
            resident.update(keys)
            excess = len(resident) - self._slots
            if excess > 0:
                candidates = resident.difference(keys) if len(keys) <= self._slots else resident
                leaving = sorted(candidates, key=coming.__getitem__)[-excess:]
                resident.difference_update(leaving)
        return misses
