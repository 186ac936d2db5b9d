"""ReMoE on Orin NX 16 GB, simulated beside the paper's figures, or measured on a board. Writes docs/results/.

    python -m bench.orin                                   simulated: no board, no model, a minute or two
    python -m bench.orin --measure v2-lite.bundle --router remoe-chat        on the board: measured figures instead

Simulated: routing of DeepSeek-V2-Lite's shape with the overlap that was published for the stock and the tuned router
(remoe/synthetic.py), replayed through LRU caches, and TPOT by the device profile `orin-nx-16gb`. Measured: the same
table from runs of `edge profile` over ShareGPT, GSM8K and HumanEval prompts with both routers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import orin_page
from bench.common import conclude, run_main, say
from export.families import read_model
from profiles.device import Device, load_device
from profiles.forecast import PLAN_CONTEXT, fit
from profiles.predict import predict
from profiles.sizes import Sizes, model_sizes
from remoe.simulate import Setting, simulate
from remoe.synthetic import SyntheticRouting, synthetic_trace
from remoe.trace import Trace
from runtime.config import ModelConfig
from runtime.layout import expert_bytes, padded
from tests.published_configs import DEEPSEEK_V2_LITE

OVERLAPS = {"base": 0.273, "ReMoE": 0.345}  # published for DeepSeek-V2-Lite
DEVICE = "orin-nx-16gb"


@dataclass(frozen=True)
class OrinOptions:
    """The paper's protocol: cold or warm, `requests` of `tokens` decode steps."""

    requests: int = 128
    tokens: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """One router with one cache: hit rate over decode, mean milliseconds per token with usual, fast and slow drive."""

    hit_rate: float
    misses_per_token: float
    tpot_ms: float
    fast_ms: float
    slow_ms: float


@dataclass(frozen=True)
class Row:
    """One cache size: `slots` per layer, whether they fit on the board in fp16, and a cell per router."""

    name: str
    slots: int
    fits: bool
    cold: bool
    cells: dict[str, Cell]


def simulated(config: ModelConfig, device: Device, options: OrinOptions) -> list[Row]:
    """Every cache size, cold and warm."""
    sizes = model_sizes(config, PLAN_CONTEXT)
    most = fit(sizes, device).slots
    lengths = ((0, options.tokens),) * options.requests
    routing = {
        name: synthetic_trace(config, SyntheticRouting(overlap, lengths, options.seed))
        for name, overlap in OVERLAPS.items()
    }
    rows = []
    for cold in (True, False):
        for name, slots in cache_sizes(sizes, most).items():
            cells = {router: _cell(trace, sizes, device, slots, cold) for router, trace in routing.items()}
            rows.append(Row(name, slots, slots <= most, cold, cells))
            say(f"{name}, {slots} slots per layer, {'cold' if cold else 'warm'}: done")
    return rows


def cache_sizes(sizes: Sizes, most: int) -> dict[str, int]:
    """By name, smallest first: as small as can be, the knee, what fits, and two that would need smaller experts."""
    found = {
        "K": sizes.top_k,
        "1.3 K": round(1.3 * sizes.top_k),
        "2 K": 2 * sizes.top_k,
        "what fits": most,
        "E / 2": sizes.experts // 2,
        "near-fit, 0.9 E": round(0.9 * sizes.experts),
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _cell(trace: Trace, sizes: Sizes, device: Device, slots: int, cold: bool) -> Cell:
    result = simulate(trace, Setting("lru", slots_per_layer=slots, cold=cold))
    found = predict(sizes, device, result.missed)
    return Cell(
        hit_rate=result.unique_hit_rate,
        misses_per_token=result.misses / result.decode_tokens,
        tpot_ms=float(np.mean(found.tpot_ms)),
        fast_ms=float(np.mean(found.fast_ms)),
        slow_ms=float(np.mean(found.slow_ms)),
    )


def run(out: Path, options: OrinOptions) -> None:
    """Simulate, and write page and picture."""
    config, device = read_model(dict(DEEPSEEK_V2_LITE), {}), load_device(DEVICE)
    rows = simulated(config, device, options)
    page = orin_page.write(out, rows, device, padded(expert_bytes(config)), (options.requests, options.tokens))
    say(f"{page} and its picture written")
    conclude("orin", {"device": device.name, "rows": [orin_page.row_json(row) for row in rows]})


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    defaults = OrinOptions()
    parser = argparse.ArgumentParser(prog="python -m bench.orin", description="ReMoE on Orin NX 16 GB")
    add = parser.add_argument
    add("--out", type=Path, default=Path("docs/results"), help="where page and picture go (default: %(default)s)")
    add("--requests", type=int, default=defaults.requests, help="simulated requests (default: %(default)s)")
    add("--tokens", type=int, default=defaults.tokens, help="decode steps per request (default: %(default)s)")
    measure = parser.add_argument_group("measure on this machine instead")
    add = measure.add_argument
    add("--measure", metavar="BUNDLE", type=Path, help="DeepSeek-V2-Lite as a bundle, with a tuned router")
    add("--router", metavar="R", help="the tuned router: its name in the bundle, or a file")
    add("--slots", type=int, nargs="+", help="slots per layer (default: K, 1.3 K, 2 K and what fits)")
    add("--prompts", type=int, default=128, help="per workload (default: %(default)s)")
    add("--runs", type=Path, default=Path("out/orin"), help="a new folder for the runs (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.measure is None:
        return run_main(lambda: run(args.out, OrinOptions(args.requests, args.tokens)))
    from bench.orin_measure import MeasureOptions
    from bench.orin_measure import measure as run_measure

    options = MeasureOptions(args.router, tuple(args.slots or ()), args.prompts, args.tokens)
    return run_main(lambda: run_measure(args.measure, options, args.runs, args.out))


if __name__ == "__main__":
    sys.exit(main())
