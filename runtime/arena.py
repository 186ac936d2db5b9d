"""The arena: one block of memory cut into equal slots, allocated and touched once. It never grows."""

from __future__ import annotations

import mmap
from typing import Protocol

import numpy as np
import torch

from runtime.errors import BudgetError


class Slots(Protocol):
    """What the cache needs of an arena, on whatever device: memory for the disk to fill, tensors to compute with, and
    to be told what happens to a slot, because a GPU may be behind.
    """

    slots: int
    size_bytes: int
    views: list[memoryview]
    tensors: list[torch.Tensor]

    def begin_write(self, slot: int) -> None:
        """The slot is about to be overwritten: waits for whatever still reads it."""
        ...

    def landed(self, slot: int) -> None:
        """The slot's new bytes are there and right."""
        ...

    def used(self, slot: int) -> None:
        """The slot has been given to the arithmetic, which may not have begun."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class Arena:
    """`slots` slots of `slot_bytes` each (whole pages), on huge pages where the kernel gives them."""

    def __init__(self, slots: int, slot_bytes: int, value_bytes: int) -> None:
        size = slots * slot_bytes
        try:
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise BudgetError(
                f"cannot allocate {size / 1e6:.0f} MB for {slots} expert slots ({error.strerror}): "
                "ask for less with --expert-memory"
            ) from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        pages = np.frombuffer(self._memory, dtype=np.uint8)
        pages[:: mmap.PAGESIZE] = 0  # fault every page in now, so that no token pays for it
        view = memoryview(self._memory)
        whole = torch.from_numpy(pages).view(torch.float16)
        self.size_bytes = size
        self.slots = slots
        self.views = [view[i * slot_bytes : (i + 1) * slot_bytes] for i in range(slots)]
        self.tensors = [whole[i * slot_bytes // 2 : i * slot_bytes // 2 + value_bytes // 2] for i in range(slots)]

    def begin_write(self, slot: int) -> None:
        """Nothing to wait for: the CPU has done what it returned from."""

    def landed(self, slot: int) -> None:
        """The arithmetic sees the slot as it is."""

    def used(self, slot: int) -> None:
        """It has been computed already."""

    def close(self) -> None:
        """The memory goes with the last view of it."""
