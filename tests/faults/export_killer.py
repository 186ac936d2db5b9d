"""Kills exports with SIGKILL in front of every file operation, and resumes them; one JSON line with what was seen.

usage: python -m tests.faults.export_killer CHECKPOINT FOLDER WORKERS

A process of its own: children are forked from it, so each starts in milliseconds, before any thread exists.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from export.exporter import export_bundle
from export.filesystem import FileSystem
from export.settings import ExportOptions
from export.verify import verify_bundle
from tests.filesystems import killed_at
from tests.unit.test_export_bundle import digests


def in_child(source: Path, out: Path, workers: int, fs: FileSystem) -> int:
    """Export in a child process; its wait status."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            export_bundle(source, out, ExportOptions(graphs=(), workers=workers, name="model"), fs=fs)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def main(source: Path, folder: Path, workers: int) -> dict[str, int]:
    """Kill at operation 1, 2, 3, ... until an export ends by itself."""
    in_child(source, folder / "reference", workers, FileSystem())
    reference = digests(folder / "reference")
    seen = {"killed": 0, "visible_after_kill": 0, "resumed": 0, "wrong": 0}
    for number in range(1, 1000):
        out = folder / "out"
        status = in_child(source, out, workers, killed_at(number))
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            seen["wrong"] += status != 0 or digests(out) != reference
            return seen
        seen["killed"] += 1
        if out.exists():
            seen["visible_after_kill"] += 1
        else:
            status = in_child(source, out, workers, FileSystem())
            seen["resumed"] += status == 0
        seen["wrong"] += digests(out) != reference or bool(verify_bundle(out).problems)
        shutil.rmtree(out)
        shutil.rmtree(folder / ".out.partial", ignore_errors=True)
    raise SystemExit("the sweep did not end")


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
