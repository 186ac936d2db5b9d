"""What every subcommand says and how: results on stdout, talk on stderr, sizes as people write them."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from runtime.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B)?", re.IGNORECASE)
_REDRAW_S = 0.1


def error(message: str) -> None:
    """One error on stderr; its further lines say what to run next."""
    _talk(f"edge: error: {message}")


def note(message: str) -> None:
    """One line of talk on stderr: an automatic choice, a fallback, a hint."""
    _talk(f"edge: {message}")


def table(rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Columns on stderr, left-aligned; the last one is not padded."""
    _talk(format_table(rows, title))


def format_table(rows: Sequence[Sequence[str]], title: str = "") -> str:
    """The text of `table`, for a subcommand whose result is the table itself (stdout)."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    lines = ["  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows]
    return "\n".join(([title] if title else []) + [f"  {line}" if title else line for line in lines])


def print_json(value: object) -> None:
    """The result of `--json`: one object on the last line of stdout."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


def parse_size(text: str) -> int:
    """Bytes of "512M", "2GiB", "1.5 GB", "4096". M and MiB are 1024^2, MB is 1000^2, as in GNU tools.

    Raises UsageError.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size; write it like 512M, 2GiB or 4096 (bytes)")
    base = 1000 if (match[3] or "").upper() == "B" else 1024
    size_bytes = int(float(match[1]) * base ** _POWERS[match[2].upper()])
    if not 0 < size_bytes < 1 << 50:
        raise UsageError(f"{text!r} is not between 1 byte and 1024 TiB")
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """A size as people read it, in powers of 1024 with three significant digits: 17300000 is "16.5 MiB"."""
    value, unit = float(size_bytes), "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1023.5:
            break
        value, unit = value / 1024, bigger
    if unit == "B":
        return f"{value:.0f} B"
    return f"{value:.{max(0, 3 - len(f'{abs(value):.0f}'))}f} {unit}"


def format_number(value: float | None, factor: float = 1.0) -> str:
    """`value` x `factor` in three significant digits without an exponent; a dash for None."""
    if value is None:
        return "-"
    scaled = value * factor
    return f"{scaled:.{0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2}f}"


class Progress:
    """Progress bars of named stages on stderr; silent when stderr is no terminal or `quiet`.

    `update(stage, done, total)` may be called as often as one likes; `unit` "bytes" shows sizes and a rate.
    """

    def __init__(self, quiet: bool = False, unit: str = "bytes") -> None:
        self._quiet = quiet or not sys.stderr.isatty()
        self._unit = unit
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._drawn_at = 0.0

    def __enter__(self) -> Progress:
        if not self._quiet:
            self._bars = _bars(self._unit)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` of `stage`; a stage appears with its first update."""
        if self._bars is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        now = time.monotonic()
        if done >= total or now - self._drawn_at >= _REDRAW_S:
            self._drawn_at = now
            self._bars.update(self._tasks[stage], completed=done, total=total)


def _bars(unit: str) -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.progress import TransferSpeedColumn as Speed

    numbers = (DownloadColumn(binary_units=True), Speed()) if unit == "bytes" else (MofNCompleteColumn(),)
    name = TextColumn("{task.description}")
    return RichProgress(name, BarColumn(), *numbers, TimeRemainingColumn(), console=Console(stderr=True))


def _talk(text: str) -> None:
    sys.stdout.flush()  # keeps answer and talk in order where both go to one terminal
    print(text, file=sys.stderr, flush=True)
