"""What recording a run costs: a record file on and off in turn, same engine, same tokens, and one line of it by itself.

    python -m bench.record out/synthetic.bundle --rounds 12 --tokens 32

Every expert is resident, so that no disk is in the way of the comparison. The two ways to measure check each other: the
time of a line is sharp but leaves out what it does to the rest; the difference of the runs has everything in it, and
the machine's mood, which its quartiles show. The promise is a share of TPOT below 1 %.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.common import conclude, interleaved, run_main, say, set_threads
from profiles.random_model import random_ids
from runtime.bundle import Bundle
from runtime.engine import Engine, EngineOptions, GenerateOptions
from runtime.errors import UsageError
from runtime.records import Recorder, TokenRecord

CEILING = 0.01  # of TPOT
_PROMPT_TOKENS = 16
_LINES = 2000


@dataclass(frozen=True)
class RecordOptions:
    """`rounds` times `tokens` decode steps with a record file and as many without."""

    tokens: int = 32
    rounds: int = 12
    threads: int | None = None


@dataclass(frozen=True)
class Overhead:
    """TPOT in ms is the median of the rounds' medians; `difference` is the share that recording adds, pair by pair."""

    tpot_off_ms: float
    tpot_on_ms: float
    difference: float
    difference_quartiles: tuple[float, float]
    line_us: float
    line_bytes: int
    line_share: float


def measure(engine: Engine, folder: Path, options: RecordOptions) -> Overhead:
    """Both measurements; record files are written into `folder`. Raises UsageError for fewer than two rounds."""
    if options.rounds < 2 or options.tokens < 2:
        raise UsageError("--rounds and --tokens: expected at least 2")
    decode(engine, None, options.tokens)  # reads the experts of these tokens, which are the same in every round
    path = folder / "record.jsonl"
    found = interleaved(
        {
            "off": lambda: median_ms(decode(engine, None, options.tokens)),
            "on": lambda: median_ms(decode(engine, path, options.tokens)),
        },
        options.rounds,
    )
    shares = [on / off - 1 for on, off in zip(found["on"], found["off"], strict=True)]
    low, _, high = statistics.quantiles(shares, n=4)
    off = statistics.median(found["off"])
    seconds, size = line_cost(decode(engine, None, options.tokens), path)
    return Overhead(
        tpot_off_ms=off,
        tpot_on_ms=statistics.median(found["on"]),
        difference=statistics.median(shares),
        difference_quartiles=(low, high),
        line_us=seconds * 1e6,
        line_bytes=size,
        line_share=seconds * 1e3 / off,
    )


def decode(engine: Engine, record: Path | None, tokens: int) -> list[TokenRecord]:
    """Records of `tokens` decode steps after a short prompt, always the same ones."""
    engine.record_to(record)
    prompt = random_ids(engine.config.vocab_size, _PROMPT_TOKENS, seed=0)
    options = GenerateOptions(max_new_tokens=tokens + 1, ignore_eos=True)
    return [token.record for token in engine.generate(prompt, options)][1:]


def median_ms(records: Sequence[TokenRecord]) -> float:
    """Median TPOT of a run."""
    return statistics.median(record.total_ms for record in records)


def line_cost(records: Sequence[TokenRecord], path: Path) -> tuple[float, int]:
    """Seconds and bytes of one line of a record: the median of many, written as the engine writes them."""
    recorder, times = Recorder(path), []
    for number in range(_LINES):
        begin = time.perf_counter()
        recorder.token(records[number % len(records)])
        times.append(time.perf_counter() - begin)
    recorder.close()
    return statistics.median(times), path.stat().st_size // _LINES


def run(bundle: Path, options: RecordOptions) -> None:
    """Measure and print."""
    set_threads(options.threads)
    with contextlib.closing(Bundle.open(bundle)) as opened:
        experts = opened.config.router.num_experts
    settings = EngineOptions(slots_per_layer=experts, context=_PROMPT_TOKENS + options.tokens + 1)
    with tempfile.TemporaryDirectory(dir=bundle.parent) as folder, Engine.open(bundle, settings) as engine:
        found = measure(engine, Path(folder), options)
    low, high = found.difference_quartiles
    say(f"ceiling:       {CEILING:.0%} of TPOT")
    say(f"one line:      {found.line_us:.0f} us for {found.line_bytes} bytes = {found.line_share:.3%} of TPOT")
    say(
        f"on and off:    TPOT {found.tpot_on_ms:.2f} and {found.tpot_off_ms:.2f} ms: {found.difference:+.2%} "
        f"(quartiles {low:+.2%} to {high:+.2%}, {options.rounds} pairs of {options.tokens} tokens)"
    )
    conclude("record", {"bundle": str(bundle), "options": asdict(options), "ceiling": CEILING, **asdict(found)})


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.record", description="what recording a run costs")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=RecordOptions.tokens, help="per run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=RecordOptions.rounds, help="pairs (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of the arithmetic (default: torch's choice)")
    options = vars(parser.parse_args(argv))
    bundle = options.pop("bundle")
    return run_main(lambda: run(bundle, RecordOptions(**options)))


if __name__ == "__main__":
    sys.exit(main())
