"""Live view of a tuning run on stderr: a bar with the latest numbers on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from edge import console

_LINE_EVERY_S = 30.0
_SHOWN = ("loss", "ppl", "lm_kl", "eor", "misses_per_token", "trust", "reuse", "miss", "margin", "tokens_per_s")
_NAMES = {"misses_per_token": "misses/token", "tokens_per_s": "tok/s"}


class TuneView:
    """Use as a context manager; `show` is given the numbers of every step."""

    def __init__(self, steps: int, quiet: bool) -> None:
        self._steps, self._quiet = steps, quiet
        self._bar: Any = None
        self._first = self._began = self._shown = time.monotonic()
        self._first_step: int | None = None

    def __enter__(self) -> TuneView:
        if not self._quiet and sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
            self._task = self._bar.add_task("tune", total=self._steps, numbers="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, numbers: dict[str, Any]) -> None:
        """One step is done."""
        text = "  ".join(f"{_NAMES.get(n, n)} {numbers[n]:.4g}" for n in _SHOWN if n in numbers)
        step, now = int(numbers["step"]), time.monotonic()
        if self._first_step is None:
            self._first_step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=text)
        elif not self._quiet and (step == self._steps or now - self._shown >= _LINE_EVERY_S):
            self._shown = now
            done = step - self._first_step + 1
            left = (now - self._began) / done * (self._steps - step)
            console.note(f"step {step}/{self._steps}  {text}  ETA {left:.0f} s")


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[numbers]}"), console=Console(stderr=True))
