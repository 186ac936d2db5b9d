"""How much of a core's rate router tuning gets, at a model's full width: what `edge tune --plan` needs to tell hours.

    python -m bench.tuning Qwen1.5-MoE-A2.7B/config.json

Random fp32 weights in the model's shape, its dense layers and its first two with experts; a few steps of `edge tune`'s
loop. Beside it, in turn, plain fp32 products of as many tokens. Both count processor time, so other work on the machine
hurts neither much; the plan's operations over that time are the rate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common import GB, conclude, run_main, say, set_threads
from export.families import parse_config
from export.source import read_config
from remoe.objective import PRESETS
from remoe.texts import pack
from remoe.tune import tune
from remoe.tune_options import TuneOptions
from remoe.tune_plan import plan
from runtime.errors import UsageError

_PRODUCTS, _COLUMNS = 8, 8192


@dataclass(frozen=True)
class TuningOptions:
    """`layers` with experts, sequences of `length` tokens, one per step. `preset` of the objective."""

    layers: int = 2
    length: int = 512
    steps: int = 5
    preset: str = "remoe"
    threads: int = 1


def run(path: Path, options: TuningOptions) -> dict[str, Any]:
    """Measure and print. Raises UsageError for a model without so many layers with experts."""
    set_threads(options.threads)
    raw = _cut(read_config(path), options.layers)
    config = parse_config(raw)
    tuning = TuneOptions(PRESETS[options.preset], steps=options.steps, batch=1, micro_batch=1)
    made = plan(config, tuning, options.length, 4)
    say(
        f"{config.family}, {options.layers} layers with experts of {config.num_layers}: {made.weight_bytes / GB:.1f} GB"
    )
    model = _random_model(raw)
    products: list[float] = []
    steps: list[float] = []
    clock = time.process_time()

    def on_step(_: object) -> None:
        nonlocal clock
        steps.append(options.length * made.step_flops / (time.process_time() - clock))
        products.append(_product_rate(options.length, config.hidden_size))
        clock = time.process_time()

    count = options.steps * options.length
    ids = torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    tune(model, config, pack([ids], options.length, config.vocab_size), tuning, on_step=on_step)
    rate, ceiling = statistics.median(steps[1:] or steps), statistics.median(products)  # the first one warms up
    say(f"ceiling: {ceiling / 1e9:.1f} GFLOP/s per core, a plain fp32 product of {options.length} tokens")
    say(f"tuning:  {rate / 1e9:.1f} GFLOP/s per core = {rate / ceiling:.0%}")
    say(f"         {made.step_flops / 1e9:.2f} GFLOP per token of these layers")
    return conclude(
        "tuning",
        {
            "config": str(path),
            "options": asdict(options),
            "step_flops_per_token": made.step_flops,
            "flops_per_core_s": rate,
            "product_flops_per_core_s": ceiling,
            "share_of_ceiling": rate / ceiling,
        },
    )


def _cut(raw: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same model with so many layers with experts, those before them included."""
    places = parse_config(raw).moe_layers
    if not 2 <= layers <= len(places):
        raise UsageError(f"--layers {layers}: expected 2 (the first gate ends the way back) to {len(places)}")
    kept = places[layers - 1] + 1
    kinds = {"layer_types": raw["layer_types"][:kept]} if "layer_types" in raw else {}
    return {**raw, "num_hidden_layers": kept, **kinds}


def _random_model(raw: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map", "torch_dtype", "dtype")}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(raw["model_type"], **known), dtype=torch.float32)


def _product_rate(rows: int, inner: int) -> float:
    """Operations per second of processor time of [rows, inner] x [inner, _COLUMNS]."""
    left, right = torch.randn(rows, inner), torch.randn(inner, _COLUMNS)
    begin = time.process_time()
    for _ in range(_PRODUCTS):
        left @ right
    return 2 * _PRODUCTS * rows * inner * _COLUMNS / (time.process_time() - begin)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tuning", description="rate of router tuning beside products")
    parser.add_argument("config", type=Path, help="config.json of a model")
    for name in ("layers", "length", "steps", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(TuningOptions, name), help="default: %(default)s")
    parser.add_argument("--preset", choices=sorted(PRESETS), default=TuningOptions.preset)
    options = vars(parser.parse_args(argv))
    path = options.pop("config")
    return run_main(lambda: run(path, TuningOptions(**options)))


if __name__ == "__main__":
    sys.exit(main())
