"""How much memory a run takes, and how much there is: the sum is made before anything large is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from runtime.control_groups import memory_limits
from runtime.errors import BudgetError

OVERHEAD_BYTES = 300_000_000  # Python, torch and the activations: bench/memory_limit.py
# What a build of torch for CUDA holds beyond that once it is imported, with a GPU or without: libcublasLt fills 86 MB
# of tables when it is loaded, and more operators are registered. 131 MB with torch 2.13 for CUDA 13.
CUDA_BUILD_BYTES = 140_000_000


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will hold, bytes. `loading_bytes` is transient: the stored form of the file being converted."""

    expert_bytes: int
    dense_bytes: int
    kv_bytes: int
    loading_bytes: int = 0
    overhead_bytes: int = OVERHEAD_BYTES

    @property
    def parts(self) -> dict[str, int]:
        """What is held at the peak, which is at the end of loading or, usually, when everything is allocated."""
        held = {"dense weights": self.dense_bytes, "overhead": self.overhead_bytes}
        running = {"experts": self.expert_bytes, "KV cache": self.kv_bytes}
        loading = {"the file being converted": self.loading_bytes}
        return {**(running if sum(running.values()) >= self.loading_bytes else loading), **held}

    @property
    def total_bytes(self) -> int:
        """The peak."""
        return sum(self.parts.values())

    def sum_in_words(self) -> str:
        """The sum, spelled out in MB."""
        words = " + ".join(f"{name} {size / 1e6:.0f}" for name, size in self.parts.items())
        return f"{words} = {self.total_bytes / 1e6:.0f} MB"

    def check(self, limit_bytes: int, limit_name: str) -> None:
        """Raises BudgetError, with the sum, when it exceeds the limit."""
        if self.total_bytes > limit_bytes:
            raise BudgetError(
                f"this run needs {self.sum_in_words()}, but {limit_name} leaves {limit_bytes / 1e6:.0f} MB: "
                "ask for less with --expert-memory, --slots-per-layer or --context"
            )


def limit() -> tuple[int, str]:
    """Memory that this process may use, itself included, in bytes, and what sets the limit."""
    process = psutil.Process().memory_info().rss
    found = [(psutil.virtual_memory().available + process, "the machine's free memory")]
    found += [(size, f"the memory limit of control group {name}") for name, size in memory_limits()]
    return min(found)
