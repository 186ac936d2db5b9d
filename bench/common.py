"""What the benchmarks share: the machine they ran on, and how they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from runtime.errors import EdgeError
from runtime.machine import core_counts, describe

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
    """Run a benchmark's body as a program: a line about the cores, one for an error, and the exit code."""
    usable, cores = core_counts()
    bound = "" if usable == cores else ": it is bound to them (taskset, cpuset, quota), and the figures are of that"
    print(f"bench: may run on {usable} of {cores} cores{bound}", file=sys.stderr)
    try:
        body()
    except EdgeError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def interleaved(rivals: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Results of every rival, one round after the other, so that a change of the machine's mood meets all of them."""
    results: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            results[name].append(run())
    return results


def set_threads(count: int | None) -> None:
    """Threads of torch's arithmetic; None keeps its own choice."""
    if count is not None:
        torch.set_num_threads(count)
