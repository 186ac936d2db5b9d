"""Does a checkpoint with tuned routers run the same in other engines? `python -m interop --out out/interop`

Each check says pass, fail or not run, with the reason. A check that has not been run proves nothing, and is listed.
Each has a file of its own with the date and the machine, so that a run of some leaves the results of the others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from edge.console import format_table
from interop.compare import FP32, NARROW
from interop.environments import Installer, NotRunError
from interop.report import remarks, table
from runtime.errors import EdgeError
from runtime.machine import describe

_TORCH = "torch==2.13.0"


def outcome(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One check; whatever it raises becomes its result."""
    begin = time.monotonic()
    try:
        found = check()
        result = {"status": "fail" if found["complaints"] else "pass", **found}
    except NotRunError as error:
        result = {"status": "not run", "reason": str(error)}
    except Exception as error:  # one broken check must not hide the others
        result = {"status": "fail", "complaints": [f"{type(error).__name__}: {error}"], "trace": traceback.format_exc()}
    return {**result, "seconds": round(time.monotonic() - begin, 1)}


def run(folder: Path, installer: Installer, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The named checks in turn; what each found is written as soon as it ends."""
    from interop.checks import CHECKS, Bench
    from interop.prepare import prepare

    _say("tuning the native twin for a few steps, and exporting it")
    bench = Bench(prepare(folder / "work"), installer, folder / "work")
    results, kept = {}, folder / "results"
    kept.mkdir(exist_ok=True)
    for name in names:
        _say(f"{name} ...")
        results[name] = outcome(lambda name=name: CHECKS[name](bench))  # type: ignore[misc]
        path = kept / f"{name.replace(' ', '-')}.json"
        path.write_text(json.dumps(document(name, results[name]), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _say(f"{name}: {results[name]['status']}, {results[name]['seconds']:.0f} s")
    return results


def document(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """What the JSON file of a check holds; a figure that is no number is null, and a complaint says so."""
    return {
        "check": name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe(),
        "limits": {"fp32": asdict(FP32), "bf16": {**asdict(NARROW), "answer_margin": None}},
        **{name: None if isinstance(value, float) and not isfinite(value) else value for name, value in result.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 when a check failed."""
    from interop.checks import CHECKS

    parser = argparse.ArgumentParser(prog="python -m interop", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("out/interop"),
        help="environments, logs and results/NAME.json (default: %(default)s)",
    )
    add("--only", metavar="NAME", nargs="+", choices=list(CHECKS), default=list(CHECKS), help=f"of {', '.join(CHECKS)}")
    add("--torch", default=_TORCH, help="for environments that have a torch of their own (default: %(default)s)")
    add("--pip-args", default="", help="added to every pip install, for example an index")
    options = parser.parse_args(argv)
    folder = options.out.resolve()
    try:
        results = run(folder, Installer(folder, options.torch, tuple(options.pip_args.split())), options.only)
    except EdgeError as error:
        print(f"interop: error: {error}", file=sys.stderr)
        return error.exit_code
    print(format_table(table(results), title="tuned routers in other engines"))
    print("\n".join(remarks(results)))
    print(f"not run: {', '.join(n for n, r in results.items() if r['status'] == 'not run') or 'nothing'}")
    print(f"written: {folder / 'results'}")
    return int(any(result["status"] == "fail" for result in results.values()))


def _say(line: str) -> None:
    print(f"interop: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
