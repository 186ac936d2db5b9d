"""`edge report`: runs of edge profile as one HTML page. (edge/report.py holds the table that `generate` prints.)"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from edge import console
from profiles.rundir import load_run
from runtime.errors import UsageError

NAME = "report"
HELP = "turn runs of edge profile into one HTML page"
EXAMPLES = """
edge report runs/stock                          runs/stock/report.html
edge report runs/stock runs/tuned               what changed, with an interval: runs/tuned/comparison.html
edge report runs/stock runs/tuned --out c.html --png figures --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge report`."""
    parser.add_argument(
        "runs", metavar="DIR", type=Path, nargs="+", help="folders of edge profile; the first is the base"
    )
    parser.add_argument("--out", metavar="FILE.html", type=Path, help="the page (default: in the last folder)")
    parser.add_argument("--png", metavar="DIR", type=Path, help="save the figures as PNG files, too")
    parser.add_argument("--json", action="store_true", help="print summaries and comparisons as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Write the page. Raises UsageError for a folder that is no run, or a run without a token."""
    from profiles.compare import compare
    from profiles.report.page import build_page, run_names
    from profiles.summary import summarize

    runs = [load_run(path) for path in args.runs]
    out = args.out or args.runs[-1] / ("report.html" if len(runs) == 1 else "comparison.html")
    page = build_page(runs, args.png)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror}") from None
    console.note(f"{out} ({console.format_bytes(len(page.encode()))})")
    if args.json:
        names = run_names(runs)
        changes = {
            n: {k: asdict(v) for k, v in compare(runs[0], r).items()} for n, r in zip(names[1:], runs[1:], strict=True)
        }
        summaries = {name: summarize(found) for name, found in zip(names, runs, strict=True)}
        console.print_json({"report": str(out), "summaries": summaries, "against_first": changes})
    return 0
