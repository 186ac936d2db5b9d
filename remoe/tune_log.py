"""The record of a tuning run: a JSONL log that survives interruptions, and a picture of it."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from runtime.errors import EdgeError, UsageError

_PANELS = (
    ("loss", ("loss", "ce", "lm_kl")),
    ("terms of the layers", ("trust", "reuse", "smooth", "lag", "window", "margin", "miss")),
    ("expert overlap ratio", ("eor", "changed")),
    ("expert misses per token", ("misses_per_token",)),
)


class TuneLog:
    """Appends one JSON object per line; each is on its way to the disk when `write` returns.

    A resumed run first takes away what was logged after the state that it resumes from.
    """

    def __init__(self, path: Path, resume_after: int | None = None) -> None:
        """`resume_after`: the last step to keep; None starts anew. Raises EdgeError, UsageError while another run of
        the same OUT is at work: the two would mix their logs and states.
        """
        self.path = path
        kept = [] if resume_after is None else [n for n in read_log(path) if n.get("step", 0) <= resume_after]
        self.history: list[dict[str, Any]] = [n for n in kept if "step" in n]
        try:
            self._file = path.open("a", buffering=1)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
            self._file.truncate(0)
            self._file.write("".join(json.dumps(n) + "\n" for n in kept))
        except BlockingIOError:
            self._file.close()
            raise UsageError(f"{path}: another run is writing this log: give each run its own --out") from None
        except OSError as error:
            raise EdgeError(f"{path}: the log cannot be written: {error.strerror}") from error

    def write(self, numbers: dict[str, Any]) -> None:
        """One line. Raises EdgeError."""
        try:
            self._file.write(json.dumps(numbers) + "\n")
        except OSError as error:
            raise EdgeError(f"{self.path}: the log cannot be written: {error.strerror}") from error
        if "step" in numbers:
            self.history.append(numbers)

    def close(self) -> None:
        """No more lines."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that was cut off is left out. Raises UsageError for anything else."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    numbers = []
    for at, line in enumerate(lines):
        try:
            numbers.append(json.loads(line))
        except ValueError:
            if at + 1 < len(lines):
                raise UsageError(f"{path}:{at + 1}: not a line of a tuning log: move the file away") from None
    return numbers


def plot(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """A PNG with the losses, the terms, the overlap and the misses over the steps. Needs matplotlib (ImportError)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (name, keys) in zip(axes.flat, _PANELS, strict=True):
        for key in keys:
            points = [(n["step"], n[key]) for n in history if key in n]
            if points:
                axis.plot(*zip(*points, strict=True), label=key, linewidth=1.2)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
