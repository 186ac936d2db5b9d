"""`edge verify`: is this bundle whole and unchanged?"""

from __future__ import annotations

import argparse

from edge import console
from runtime.errors import BundleError

NAME = "verify"
HELP = "check every file of a bundle"
EXAMPLES = """
edge verify qwen.bundle
edge verify qwen.bundle --quick
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge verify`."""
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument(
        "--quick", action="store_true", help="names, sizes and tensor headers only; without it every byte is hashed"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Check, list every problem on stdout, return 2 if there is one."""
    from export.verify import verify_bundle

    with console.Progress(quiet=args.json) as bars:
        report = verify_bundle(
            args.bundle, full=not args.quick, progress=lambda done, total: bars.update("verify", done, total)
        )
    if args.json:
        console.print_json(
            {
                "bundle": args.bundle,
                "ok": not report.problems,
                "full": report.full,
                "files": report.files,
                "bytes": report.bytes,
                "problems": list(report.problems),
            }
        )
    else:
        for problem in report.problems:
            print(problem)
        what = "every hash is right" if report.full else "names, sizes and headers are right"
        size = f"{report.files} files, {console.format_bytes(report.bytes)}"
        print(f"{args.bundle}: {f'{len(report.problems)} problems' if report.problems else what} ({size})")
    return BundleError.exit_code if report.problems else 0
