"""The ceiling of all arithmetic: memory bandwidth, as profiles/bandwidth.py measures it. `python -m bench.bandwidth`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from bench.common import GB, conclude, run_main, say, set_threads
from profiles.bandwidth import measure_bandwidth


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
