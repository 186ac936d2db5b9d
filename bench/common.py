"""What the benchmarks share: the machine they ran on, how they print, and memory to read into."""

from __future__ import annotations

import json
import mmap
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from runtime.errors import EdgeError
from runtime.machine import describe

MB = 1e6
GB = 1e9


def say(line: str = "") -> None:
    """One line of a benchmark's report."""
    print(line, flush=True)


def conclude(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Print the last line of a benchmark, one JSON object with the machine in it. Returns `result`."""
    line = {"bench": name, **result, "threads": torch.get_num_threads(), "machine": describe()}
    say(json.dumps(line, allow_nan=False))
    return result


def run_main(body: Callable[[], object]) -> int:
    """Run a benchmark's body as a program: one line for an error, and the exit code."""
    try:
        body()
    except EdgeError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def page_aligned(size_bytes: int) -> memoryview:
    """Private memory on huge pages where the kernel gives them, every page touched: a target for O_DIRECT."""
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for offset in range(0, size_bytes, mmap.PAGESIZE):
        memory[offset] = 1
    return memoryview(memory)


def interleaved(rivals: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Results of every rival, one round after the other, so that a change of the machine's mood meets all of them."""
    results: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            results[name].append(run())
    return results


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


def set_threads(count: int | None) -> None:
    """Threads of torch's arithmetic; None keeps its own choice."""
    if count is not None:
        torch.set_num_threads(count)
