"""Memory bandwidth as arithmetic sees it: fp16 matrix times vector, a plain sum, a copy. `python -m bench.bandwidth`

Every buffer is far larger than a cache and used in turn, so that each call comes from memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from bench.common import GB, conclude, median_seconds, run_main, say, set_threads

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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.bandwidth", description="memory bandwidth with torch")
    parser.add_argument("--threads", type=int, help="threads of the arithmetic (default: torch's choice)")
    options = parser.parse_args(argv)
    return run_main(lambda: run(options.threads))


def run(threads: int | None) -> None:
    """Measure and print."""
    set_threads(threads)
    found = measure_bandwidth()
    say(f"memory GB/s, {torch.get_num_threads()} threads")
    say(f"  fp16 matrix x vector  {found.gemv_bytes_per_s / GB:6.1f}")
    say(f"  sum of fp32           {found.sum_bytes_per_s / GB:6.1f}")
    say(f"  copy, read + write    {found.copy_bytes_per_s / GB:6.1f}")
    conclude("bandwidth", {**asdict(found), "best_bytes_per_s": found.best})


if __name__ == "__main__":
    sys.exit(main())
