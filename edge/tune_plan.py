"""`edge tune --plan`: what a run would take, from config.json alone."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from edge import console
from remoe.tune_options import TuneOptions
from runtime.errors import UsageError

_ITEM_BYTES = {"fp32": 4, "bf16": 2}


def show_plan(args: argparse.Namespace, options: TuneOptions) -> int:
    """Memory, operations per token, and hours at some sustained rates."""
    from export.families import parse_config
    from export.source import find_source, read_config
    from remoe.tune_plan import plan

    if not args.checkpoint:
        raise UsageError("--plan needs CHECKPOINT, or its config.json")
    tflops: list[float] = [100.0, 200.0, 300.0] if args.tflops is None else args.tflops
    if any(not 0 < rate < 1e6 for rate in tflops):
        shown = " ".join(f"{rate:g}" for rate in tflops)
        raise UsageError(f"--tflops {shown}: expected numbers above 0, in 10^12 operations per second")
    path = Path(args.checkpoint)
    config = parse_config(read_config(path if path.is_file() else find_source(args.checkpoint)))
    options.check(config)
    made = plan(config, options, args.sequence_length, _ITEM_BYTES[args.dtype])
    rates = [
        {
            "tflops": rate,
            "tokens_per_s": rate * 1e12 / made.step_flops,
            "hours": made.seconds(rate * 1e12) / 3600,
        }
        for rate in tflops
    ]
    if args.json:
        console.print_json({**asdict(made), "memory_bytes": made.memory_bytes, "rates": rates})
        return 0
    rows = [
        ["frozen weights", console.format_bytes(made.weight_bytes)],
        ["gates", f"{console.format_bytes(made.gate_bytes)} ({made.gate_parameters / 1e6:.2f} M parameters)"],
        ["activations", console.format_bytes(made.activation_bytes)],
        ["logits of a chunk", console.format_bytes(made.head_bytes)],
        ["memory", console.format_bytes(made.memory_bytes)],
        ["forward", f"{made.forward_flops / 1e9:.2f} GFLOP per token"],
        ["step", f"{made.step_flops / 1e9:.2f} GFLOP per token"],
        ["tokens", f"{made.tokens / 1e6:.1f} M"],
        *[[f"at {r['tflops']:g} TFLOP/s", f"{r['tokens_per_s']:,.0f} tokens/s, {r['hours']:.2f} h"] for r in rates],
    ]
    print(console.format_table(rows))
    return 0
