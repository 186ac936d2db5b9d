"""`edge forecast`: a model on a board, from its config alone: does it fit, and how long would a token take at least."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from edge import console
from profiles.device import Device, device_names, load_device
from profiles.forecast import Forecast, Point, assumptions, forecast
from runtime import layout
from runtime.config import ModelConfig
from runtime.errors import UsageError

NAME = "forecast"
HELP = "tell from a config whether a model fits a board, and how fast it can be at best"
EXAMPLES = """
edge forecast config.json --device orin-nx-16gb
edge forecast ./Qwen1.5-MoE-A2.7B --device orin-nx-8gb --context 2048
edge forecast qwen.bundle --device orin-nx-16gb --overlap 0.2156 --json
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
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the forecast; a model that does not fit is an answer, too (exit code 0)."""
    device = load_device(args.device)
    found = forecast(_config(args.path), device, args.context, args.overlap)
    console.note("a forecast, not a measurement: not yet run on a board, and the times are floors")
    if args.json:
        figures = {name: asdict(figure) for name, figure in assumptions(device)}
        console.print_json({"device": device.name, **asdict(found), "assumptions": figures})
    else:
        print(console.format_table(_rows(found), title=f"{args.path} on {device.title}"))
        print(console.format_table(_assumed(device), title="standing on"))
    return 0


def _config(path: Path) -> ModelConfig:
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


def _rows(found: Forecast) -> list[list[str]]:
    size = console.format_bytes
    fit, usual, best, worst = found.fit, found.usual, found.best, found.worst
    rows = [["memory for experts", f"{size(fit.expert_bytes)} of {size(fit.usable_bytes)} usable"]]
    if usual is None or best is None or worst is None:
        return [*rows, ["fits", f"no: {fit.slots} slots per layer are fewer than a token needs"]]
    rows += [
        ["fits", f"yes, {fit.slots} slots per layer"],
        ["hit rate", f"{usual.hit_rate:.0%} ({worst.hit_rate:.0%} to {best.hit_rate:.0%})"],
        ["read per token", f"{size(usual.read_bytes_per_token)}, {usual.misses_per_token:.0f} experts"],
        ["TPOT, at least", f"{usual.tpot_ms:.0f} ms ({best.tpot_ms:.0f} to {worst.tpot_ms:.0f})"],
        ["limited by", usual.limit],
    ]
    return rows + [["would help", _help(name, result, usual)] for name, result in found.helps]


def _help(name: str, result: Point, usual: Point) -> str:
    return f"{name}: {result.tpot_ms:.0f} ms ({1 - result.tpot_ms / usual.tpot_ms:.0%} less)"


def _assumed(device: Device) -> list[list[str]]:
    return [[name, f"{figure.value / 1e9:.2f}e9", figure.mark, figure.source] for name, figure in assumptions(device)]
