"""Fixed size, proved: `edge generate` under a memory limit of exactly what its plan says, and under 10 % less.

    python -m bench.memory_limit out/demo.bundle --slots 8      needs root

The first run must end without meeting the limit once; the second must be refused at start, with the sum.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.cgroup import MemoryGroup, Verdict
from bench.common import MB, conclude, run_main, say
from runtime import backends
from runtime.budget import plan_run
from runtime.bundle import Bundle
from runtime.errors import EdgeError
from runtime.memory import MemoryPlan
from runtime.options import DTYPES, EngineOptions

_PROMPT_IDS = "1,2,3,4,5,6,7,8"
_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class LimitOptions:
    """The run that is limited."""

    slots: int
    tokens: int = 2000
    dtype: str = "fp16"
    backend: str = "torch"

    @property
    def context(self) -> int:
        """Room for the prompt and every token."""
        return self.tokens + 8


def plan(bundle: Path, options: LimitOptions) -> MemoryPlan:
    """What the engine will say that the run needs."""
    opened = Bundle.open(bundle)
    try:
        engine_options = EngineOptions(slots_per_layer=options.slots)
        name, _ = backends.choose(options.backend)
        return plan_run(opened, engine_options, name, DTYPES[options.dtype], options.context, [])[1]
    finally:
        opened.close()


def run_limited(bundle: Path, options: LimitOptions, limit_bytes: int) -> Verdict:
    """`edge generate` in a group with that limit. Raises EdgeError where no group can be made."""
    with MemoryGroup(limit_bytes) as group:
        return group.run(generate_command(bundle, options), _TIMEOUT_S)


def generate_command(bundle: Path, options: LimitOptions) -> list[str]:
    """The command line of the limited run."""
    words = [
        sys.executable,
        "-m",
        "edge",
        "generate",
        str(bundle),
        "--prompt-ids",
        _PROMPT_IDS,
        "--ignore-eos",
        "--json",
    ]
    words += ["--max-new-tokens", str(options.tokens), "--context", str(options.context)]
    words += ["--slots-per-layer", str(options.slots), "--dtype", options.dtype, "--backend", options.backend]
    return words


def check_enough(verdict: Verdict, options: LimitOptions) -> dict[str, Any]:
    """The report of a run that must have ended without meeting its limit. Raises EdgeError."""
    if verdict.exit_code != 0:
        raise EdgeError(f"`edge generate` ended with exit code {verdict.exit_code}: {verdict.stderr.strip()[-500:]}")
    report: dict[str, Any] = json.loads(verdict.stdout.splitlines()[-1])
    if verdict.oom_kills or verdict.limit_hits or len(report["token_ids"]) != options.tokens:
        raise EdgeError(
            f"under {verdict.limit_bytes / MB:.0f} MB the limit was met {verdict.limit_hits} times, "
            f"{verdict.oom_kills} killed, {len(report['token_ids'])} of {options.tokens} tokens"
        )
    return report


def check_refused(verdict: Verdict) -> None:
    """The run must have been refused at start with the sum. Raises EdgeError."""
    if verdict.exit_code != 2 or "this run needs" not in verdict.stderr:
        raise EdgeError(
            f"expected a refusal with exit code 2, found {verdict.exit_code}: {verdict.stderr.strip()[-500:]}"
        )


def run(bundle: Path, options: LimitOptions) -> None:
    """Both runs, and their figures."""
    planned = plan(bundle, options)
    say(f"ceiling: the engine's plan is {planned.sum_in_words()}")
    enough = run_limited(bundle, options, planned.total_bytes)
    report = check_enough(enough, options)
    say(f"limit {enough.limit_bytes / MB:.0f} MB: {options.tokens} tokens, TPOT {report['tpot_ms']['median']:.1f} ms;")
    say(f"  peak {_mb(enough.peak_bytes)}, limit met {enough.limit_hits} times, {enough.oom_kills} killed")
    less = run_limited(bundle, options, planned.total_bytes * 9 // 10)
    check_refused(less)
    say(f"limit {less.limit_bytes / MB:.0f} MB: refused with exit code 2 at {_mb(less.peak_bytes)}:")
    refusal = next(line for line in less.stderr.splitlines() if "this run needs" in line)
    say(f"  {refusal}")
    result = {
        "bundle": str(bundle),
        "options": asdict(options),
        "plan_bytes": planned.total_bytes,
        "peak_bytes": enough.peak_bytes,
        "limit_hits": enough.limit_hits,
        "oom_kills": enough.oom_kills,
        "tpot_ms": report["tpot_ms"],
        "refusal": refusal,
    }
    conclude("memory_limit", result)


def _mb(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else f"{size_bytes / MB:.0f} MB"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory_limit", description="generate under a memory limit")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--slots", type=int, required=True, help="slots per layer")
    parser.add_argument("--tokens", type=int, default=LimitOptions.tokens, help="default: %(default)s")
    parser.add_argument("--dtype", default=LimitOptions.dtype)
    parser.add_argument("--backend", default=LimitOptions.backend)
    words = vars(parser.parse_args(argv))
    bundle = words.pop("bundle")
    return run_main(lambda: run(bundle, LimitOptions(**words)))


if __name__ == "__main__":
    sys.exit(main())
