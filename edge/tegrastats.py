"""`edge tegrastats`: a log of tegrastats as JSON lines, or as a table of what was in it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import IO

from edge import console
from profiles.telemetry.reading import Reading
from profiles.telemetry.tegrastats_line import BrokenLineError, parse_line
from runtime.errors import UsageError

NAME = "tegrastats"
HELP = "turn a tegrastats log into JSON lines or a summary"
EXAMPLES = """
edge tegrastats tegra.log                   smallest, mean and largest value of everything
edge tegrastats tegra.log --json            one JSON object per line
sudo tegrastats --interval 500 | edge tegrastats - --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge tegrastats`."""
    parser.add_argument("file", metavar="FILE", help="a log; - reads stdin. Empty lines and # comments are left out")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line, as the lines come")


def run(args: argparse.Namespace) -> int:
    """Convert; broken lines are named on stderr and left out. Raises UsageError when no line can be read."""
    with _open(args.file) as file:
        readings = _readings(file, args.file)
        if args.json:
            count = 0
            for count, reading in enumerate(readings, 1):  # noqa: B007 - the last number is wanted
                console.print_json(reading.to_json())
        else:
            found = list(readings)
            count = len(found)
            if found:
                print(console.format_table(_rows(found), title=f"{args.file}: {count} readings"))
    if not count:
        raise UsageError(f"{args.file}: no line of tegrastats in it")
    return 0


def _open(name: str) -> IO[bytes]:
    if name == "-":
        return sys.stdin.buffer
    try:
        return open(name, "rb")
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from None


def _readings(lines: Iterable[bytes], name: str) -> Iterator[Reading]:
    for number, line in enumerate(lines, 1):
        text = line.decode("utf-8", errors="replace").strip()
        if not text or text.startswith("#"):
            continue
        try:
            yield parse_line(text)
        except BrokenLineError as error:
            console.note(f"{name}: line {number} left out: {error}")


def _rows(readings: list[Reading]) -> list[list[str]]:
    """Smallest, mean and largest of every value that occurs, in the order of the readings."""
    columns: dict[str, list[float]] = {}
    for reading in readings:
        for name, value in _values(reading):
            columns.setdefault(name, []).append(value)
    rows = [
        [name, *(f"{v:.1f}" for v in (min(c), sum(c) / len(c), max(c))), str(len(c))] for name, c in columns.items()
    ]
    return [["", "min", "mean", "max", "readings"], *rows]


def _values(reading: Reading) -> Iterator[tuple[str, float]]:
    cores = [load for load in reading.cpu_percent if load is not None]
    plain = {
        "RAM used, MiB": reading.ram_used_mib,
        "swap used, MiB": reading.swap_used_mib,
        "CPU, % of the cores that are on": sum(cores) / len(cores) if cores else None,
        "GPU, %": reading.gr3d_percent,
        "GPU, MHz": reading.gr3d_mhz[0] if reading.gr3d_mhz else None,
        "memory controller, %": reading.emc_percent,
        "memory controller, MHz": reading.emc_mhz,
        **{f"{zone}, °C": value for zone, value in reading.temperatures_c.items()},
        **{f"{rail}, mW": power.current for rail, power in reading.power_mw.items()},
    }
    return ((name, value) for name, value in plain.items() if value is not None)
