"""Memory bandwidth as arithmetic sees it: fp16 matrix times vector, a plain sum, a copy.

Every buffer is far larger than a processor's cache and used in turn, so that each call comes from memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_ROWS, _COLUMNS = 8192, 4096  # 64 MiB of fp16
_BUFFERS = 8


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second read by a matrix-vector product and a sum; read and written by a copy."""

    gemv_bytes_per_s: float
    sum_bytes_per_s: float
    copy_bytes_per_s: float

    @property
    def best(self) -> float:
        """The best of them: the ceiling."""
        return max(self.gemv_bytes_per_s, self.sum_bytes_per_s, self.copy_bytes_per_s)


@torch.inference_mode()
def measure_bandwidth(rounds: int = 5) -> Bandwidth:
    """With torch's current number of threads; takes 1 GiB of memory and a few seconds."""
    matrices = [torch.full((_ROWS, _COLUMNS), 0.5, dtype=torch.float16) for _ in range(_BUFFERS)]
    vector = torch.ones(1, _COLUMNS, dtype=torch.float16)
    floats = [m.view(torch.float32) for m in matrices]
    targets = [torch.empty_like(f) for f in floats]
    size = matrices[0].nbytes
    gemv = median_seconds([lambda m=m: torch.nn.functional.linear(vector, m) for m in matrices], rounds)  # type: ignore[misc]
    plain = median_seconds([lambda f=f: f.sum() for f in floats], rounds)  # type: ignore[misc]
    copy = median_seconds([lambda t=t, f=f: t.copy_(f) for t, f in zip(targets, floats, strict=True)], rounds)  # type: ignore[misc]
    return Bandwidth(size / gemv, size / plain, 2 * size / copy)


def median_seconds(calls: Sequence[Callable[[], object]], rounds: int) -> float:
    """Median over `rounds` of the time of all calls in a row, divided by their number; 0 for no calls."""
    if not calls:
        return 0.0
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - begin) / len(calls))
    return statistics.median(times)
