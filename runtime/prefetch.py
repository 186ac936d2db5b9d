"""Experts of the next layer, read on a guess while the disk would be idle.

Each is read into a slot beside the cache. When the router then asks for it, the cache gives the slot that it has made
room in for this one; when it does not, the rest of the read is cancelled. So hits, misses and what is in the cache are
as they would be without: a right guess is a miss that does not wait as long.
"""

from __future__ import annotations

import queue
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from runtime.arena import Slots
from runtime.loader import Load, Loader

Key = tuple[int, int]  # layer, expert


@dataclass
class PrefetchCounts:
    """What came of guesses: `right`, experts that were asked for, and bytes that were read for the others."""

    right: int = 0
    wasted_bytes: int = 0


class Prefetch:
    """A few slots of an arena, and the reads into them."""

    def __init__(self, arena: Slots, loader: Loader, slots: Iterable[int]) -> None:
        self._arena, self._loader = arena, loader
        self._free = list(slots)
        self._count = len(self._free)
        self._reads: dict[Key, tuple[Load, int]] = {}  # guesses nobody has decided about, and their slots
        self._leaving: dict[Load, int] = {}  # wrong ones: the slot is taken until the read has ended
        self._done: queue.SimpleQueue[Load] = queue.SimpleQueue()
        self._counts = PrefetchCounts()

    @property
    def slots(self) -> set[int]:
        """Those of the arena that are beside the cache now."""
        return {*self._free, *(slot for _, slot in self._reads.values()), *self._leaving.values()}

    def start(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read as many of these as there are slots for. Raises ReadError when the disk does not answer."""
        while self._leaving and (load := self._loader.ended(self._done)) is not None:
            if load in self._leaving:
                self._waste(load, self._leaving.pop(load))
        fresh = [expert for expert in experts if (layer, expert) not in self._reads]
        for expert in fresh[: len(self._free)]:
            slot = self._free[-1]
            self._arena.begin_write(slot)
            load = self._loader.submit(layer, expert, self._arena.views[slot], self._done)
            self._reads[layer, expert] = load, self._free.pop()

    def keep(self, layer: int, experts: Collection[int]) -> None:
        """The router has chosen in this layer: every guess but those among `experts` was wrong."""
        for key in [key for key in self._reads if key[0] != layer or key[1] not in experts]:
            load, slot = self._reads.pop(key)
            if load.ended:
                self._waste(load, slot)
            else:
                self._leaving[load] = slot
                self._loader.cancel(load)

    def claim(self, key: Key, slot: int, done: queue.SimpleQueue[Load]) -> int | None:
        """The slot where this expert is or will be, in exchange for `slot`; None where it was not guessed.

        `done` receives the load.
        """
        if key not in self._reads:
            return None
        load, own = self._reads.pop(key)
        self._free.append(slot)
        self._counts.right += 1
        load.redirect(done)
        return own

    def take_counts(self) -> PrefetchCounts:
        """What happened since the last call."""
        counts, self._counts = self._counts, PrefetchCounts()
        return counts

    def check_integrity(self) -> None:
        """No slot is lost or in two places."""
        assert len(self.slots) == self._count, "free + read into != slots for guesses"

    def _waste(self, load: Load, slot: int) -> None:
        self._counts.wasted_bytes += load.bytes
        self._free.append(slot)
