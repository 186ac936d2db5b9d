"""`edge profile`: a workload through a bundle, every token and the machine's state written into a new folder."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from edge import console
from edge.interrupt import Interrupt
from edge.options import add_engine_arguments, engine_options
from profiles.protocol import PROTOCOLS
from profiles.telemetry.sources import CHOICES
from profiles.workloads import WORKLOADS, load_workload
from runtime.errors import UsageError

NAME = "profile"
HELP = "measure tokens over a workload, with power and temperature beside them"
EXAMPLES = """
edge profile qwen.bundle --out runs/own
edge profile qwen.bundle --workload gsm8k --protocol remoe --slots-per-layer 16 --out runs/stock
edge profile qwen.bundle --workload gsm8k --protocol remoe --slots-per-layer 16 --router remoe-chat --out runs/tuned
edge profile qwen.bundle --workload mine.jsonl --prompts 4 --repeats 3 --cache cold --out runs/mine
"""
INTERRUPTED = 130
_NOTE = "\nedge: stopping after the token in work; press Ctrl-C again to end at once\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge profile`."""
    add_engine_arguments(parser)
    group = parser.add_argument_group("profile")
    add = group.add_argument
    add("--out", metavar="DIR", type=Path, required=True, help="the new folder of this run")
    add("--workload", metavar="W", default="own", help=f"{', '.join(WORKLOADS)}, or a .jsonl file (default: own)")
    add("--protocol", choices=list(PROTOCOLS), default="default", help="sets the next six together")
    add("--prompts", metavar="N", type=int, help="how many prompts of the workload")
    add("--new-tokens", metavar="N", type=int, help="tokens per answer, greedy")
    add("--cache", choices=["cold", "warm"], help="cold: no expert in memory when a request begins")
    add("--repeats", metavar="N", type=int, help="how often the prompts are gone through")
    add("--warm-up", metavar="N", type=int, help="requests that are not counted, before all others")
    add(
        "--respect-eos",
        dest="ignore_eos",
        action="store_const",
        const=False,
        help="an end-of-text token ends an answer",
    )
    add("--chat", action="store_true", help="put each prompt into the model's chat template")
    add("--telemetry", choices=CHOICES, default="auto", help="where power, temperature and clocks come from")
    add("--settle", metavar="S", type=float, default=0.0, help="wait until temperatures are steady, S seconds at most")
    add("--download", metavar="DIR", type=Path, default=Path("out/download"), help="where workloads are kept")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Profile; 0, or 130 after Ctrl-C with what there was until then. Raises EdgeError."""
    if not 0 <= args.settle < math.inf:
        raise UsageError(f"--settle {args.settle}: expected seconds from 0 on")
    names = ("prompts", "new_tokens", "cache", "repeats", "warm_up", "ignore_eos")
    protocol = PROTOCOLS[args.protocol].changed(**{name: getattr(args, name) for name in names})
    workload = load_workload(args.workload, args.download)
    from profiles.run import ProfileOptions, profile
    from runtime.engine import Engine

    options = ProfileOptions(workload, protocol, args.telemetry, args.chat, args.settle)
    with Engine.open(args.bundle, engine_options(args)) as engine, Interrupt(note=_NOTE) as interrupt:
        for line in engine.notes:
            console.note(line)
        with console.Progress(quiet=args.json, unit="requests") as progress:
            outcome = profile(
                engine, options, args.out,
                progress=lambda done, total: progress.update("requests", done, total),
                note=console.note, stop=lambda: interrupt.requested,
            )  # fmt: skip
    console.table(summary_rows(outcome.summary), title=str(args.out))
    follows = f"run: edge report {args.out}" if outcome.summary["decode_tokens"] else "nothing to report"
    console.note(f"{'' if outcome.complete else 'interrupted; '}{follows}")
    if args.json:
        console.print_json(outcome.summary)
    return 0 if outcome.complete else INTERRUPTED


def summary_rows(summary: dict[str, Any]) -> list[list[str]]:
    """The figures of a run as people read them; a dash where nothing was measured."""
    energy, telemetry, parts = summary["energy"], summary["telemetry"] or {}, summary["parts_ms"] or {}
    done = f"{summary['requests']} of {summary['requests_wanted']}"
    tpot = ", ".join(f"{name} {console.format_number(value)}" for name, value in summary["tpot_ms"].items())
    shares = ", ".join(f"{name.removesuffix('_ms')} {console.format_number(ms)}" for name, ms in parts.items()) or "-"
    joules, rails = console.format_number(energy["joules_per_token"]), " + ".join(energy["rails"]) or "no power rail"
    return [
        ["requests", f"{done}, {summary['decode_tokens']} tokens decoded"],
        ["TTFT", f"median {console.format_number(summary['ttft_ms']['median'])} ms"],
        ["TPOT", f"{tpot} ms"],
        ["parts", f"{shares} ms"],
        ["hit rate", f"{console.format_number(summary['hit_rate'], 100)} %"],
        ["read", f"{console.format_number(summary['bytes_per_token'], 1e-6)} MB per token"],
        ["energy", f"{joules} J per token ({rails})"],
        ["temperature", f"{_between(telemetry.get('temperature_c'))} °C"],
    ]


def _between(found: dict[str, float] | None) -> str:
    return f"{found['min']:.1f} to {found['max']:.1f}" if found else "-"
