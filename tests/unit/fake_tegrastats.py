"""A `tegrastats` on PATH that does what its mode says. A shell script: it starts fast and has children of its own."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

LINE = "RAM {n}/15656MB CPU [1%@1984,off] GR3D_FREQ 7% cpu@50C VDD_IN 5000mW/1mW VDD_CPU_GPU_CV 2000mW/1mW"
_HEAD = """#!/bin/sh
echo $$ >> "{pids}"
[ "$1" = --interval ] || exit 64
n=0
line() {{ n=$((n + 1)); echo "RAM $n/15656MB CPU [1%@1984,off] GR3D_FREQ 7% cpu@50C VDD_IN 5000mW/1mW"; }}
"""
MODES = {
    "steady": "while :; do line; sleep 0.02; done",
    "silent": "sleep 60",
    "hangs": "line; line; sleep 60",
    "pauses": "line; sleep 1.3; while :; do line; sleep 0.02; done",
    "dies": "line; line; echo 'sensor lost' >&2; exit 3",
    "refuses": "echo 'needs root' >&2; exit 1",
    "garbage": "while :; do echo 'Segmentation fnord'; sleep 0.02; done",
    "mixed": "while :; do line; echo 'RAM lots'; sleep 0.02; done",
    "endless": "line; exec tr '\\0' x < /dev/zero",  # no newline ever
    "stubborn": "trap '' TERM; while :; do line; sleep 0.02; done",
    "leaves a child": "(trap '' TERM; while :; do sleep 0.05; done) & while :; do line; sleep 0.02; done",
}


class FakeTegrastats:
    """Installs a mode on PATH, and knows which processes it has started."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._pids = folder, folder / "pids"
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def install(self, mode: str) -> None:
        program = self._folder / "tegrastats"
        program.write_text(_HEAD.format(pids=self._pids) + MODES[mode] + "\n")
        program.chmod(0o755)

    @property
    def started(self) -> int:
        return len(self._pids.read_text().split()) if self._pids.exists() else 0

    def running(self) -> list[str]:
        """Processes of the groups that were started and still run (a zombie waits for init, it does not run)."""
        groups = {int(pid) for pid in self._pids.read_text().split()} if self._pids.exists() else set()
        found = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {process.name()}")
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue  # it ended while we looked
        return found
