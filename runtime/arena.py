"""The arena: one block of memory cut into equal slots, allocated and touched once. It never grows."""

from __future__ import annotations

import mmap

import numpy as np
import torch

from runtime.errors import BudgetError


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
