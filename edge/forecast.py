"""`edge forecast`: a model on a board, from its config alone: does it fit, and how long would a token take at least."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from edge import console
from profiles.device import Device, device_names, load_device
from profiles.forecast import Forecast, Misses, Point, assumptions, forecast
from profiles.sizes import model_sizes
from runtime import layout
from runtime.config import ModelConfig
from runtime.errors import UsageError

NAME = "forecast"
HELP = "tell from a config whether a model fits a board, and how fast it can be at best"
EXAMPLES = """
edge forecast config.json --device orin-nx-16gb
edge forecast ./Qwen1.5-MoE-A2.7B --device orin-nx-8gb --context 2048
edge forecast qwen.bundle --device orin-nx-16gb --overlap 0.2156 --json
edge forecast qwen.bundle --device here.toml --trace chats.trace.safetensors --slots-per-layer 16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge forecast`."""
    parser.add_argument("path", metavar="MODEL", type=Path, help="a bundle, a checkpoint folder or config.json")
    parser.add_argument("--device", metavar="D", required=True, help=f"{', '.join(device_names())}, or a .toml file")
    parser.add_argument("--context", metavar="N", type=int, help="tokens of the KV cache (default: at most 4096)")
    parser.add_argument(
        "--overlap", metavar="R", type=float,
        help="share of a token's experts that the token before had (default: as in published models)",
    )  # fmt: skip
    parser.add_argument("--trace", metavar="FILE", type=Path, help="hit rates by simulating this trace of edge trace")
    parser.add_argument("--slots-per-layer", metavar="N", type=int, help="a cache of this size (default: what fits)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the forecast; a model that does not fit is an answer, too (exit code 0)."""
    device = load_device(args.device)
    config = load_config(args.path)
    misses = None if args.trace is None else _misses(args, config)
    found = forecast(config, device, args.context, args.overlap, args.slots_per_layer, misses)
    console.note(_caution(device))
    if args.json:
        figures = {name: asdict(figure) for name, figure in assumptions(device)}
        console.print_json({"device": device.name, **asdict(found), "assumptions": figures})
    else:
        print(console.format_table(_rows(found, device.overheads is not None), title=f"{args.path} on {device.title}"))
        print(console.format_table(_assumed(device), title="standing on"))
    return 0


def _misses(args: argparse.Namespace, config: ModelConfig) -> Misses:
    from profiles.predict import trace_misses
    from remoe.trace import Trace

    if args.overlap is not None:
        raise UsageError("--overlap and --trace say the same thing twice: give one of them")
    return trace_misses(Trace.load(args.trace), model_sizes(config, 1))


def _caution(device: Device) -> str:
    if device.overheads is None:
        return "a forecast, not a measurement: not yet run on a board, and the times are floors"
    return "a forecast, not a measurement: with what edge calibrate measured on that machine"


def load_config(path: Path) -> ModelConfig:
    """Of a bundle, a checkpoint folder or a config.json. Raises UsageError when it is none of them."""
    if (path / layout.MANIFEST).exists():
        from runtime.bundle import Bundle

        bundle = Bundle.open(path)
        bundle.close()
        return bundle.config
    from export.families import read_model
    from export.source import read_config

    if not path.exists():
        raise UsageError(f"{path}: no such bundle, checkpoint or config.json")
    return read_model(read_config(path), {})


def _rows(found: Forecast, calibrated: bool) -> list[list[str]]:
    size = console.format_bytes
    fit, usual, best, worst = found.fit, found.usual, found.best, found.worst
    least = "TPOT" if calibrated else "TPOT, at least"
    rows = [["memory for experts", f"{size(fit.expert_bytes)} of {size(fit.usable_bytes)} usable"]]
    if usual is None or best is None or worst is None:
        return [*rows, ["fits", f"no: {fit.slots} slots per layer are fewer than a token needs"]]
    rows += [
        ["fits", f"yes, {fit.slots} slots per layer"],
        ["hit rate", f"{usual.hit_rate:.0%} ({worst.hit_rate:.0%} to {best.hit_rate:.0%})"],
        ["read per token", f"{size(usual.read_bytes_per_token)}, {usual.misses_per_token:.0f} experts"],
        [least, f"{usual.tpot_ms:.0f} ms ({best.tpot_ms:.0f} to {worst.tpot_ms:.0f})"],
        ["limited by", usual.limit],
    ]
    return rows + [["would help", _help(name, result, usual)] for name, result in found.helps]


def _help(name: str, result: Point, usual: Point) -> str:
    return f"{name}: {result.tpot_ms:.0f} ms ({1 - result.tpot_ms / usual.tpot_ms:.0%} less)"


def _assumed(device: Device) -> list[list[str]]:
    return [[name, _value(name, figure.value), figure.mark, figure.source] for name, figure in assumptions(device)]


def _value(name: str, value: float) -> str:
    if name.endswith("_s"):
        return f"{1e6 * value:.0f} µs"
    return f"{value / 1e9:.2f}e9" if value >= 1e6 else f"{value:.3g}"
