"""A memory limit around a command: a control group of version 1 or 2, whichever is mounted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import EdgeError
from runtime.layout import padded

_V1_ROOT = Path("/sys/fs/cgroup/memory")
_V2_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Verdict:
    """What became of a command under a limit. `limit_hits`: how often it pressed against the limit."""

    exit_code: int
    stdout: str
    stderr: str
    limit_bytes: int
    peak_bytes: int | None  # version 2 tells since Linux 5.19
    limit_hits: int
    oom_kills: int


class MemoryGroup:
    """A control group with a memory limit; a context manager that removes it."""

    def __init__(self, limit_bytes: int) -> None:
        """Raises EdgeError, with the reason, where no group can be made."""
        self.limit_bytes = padded(limit_bytes)  # the kernel would round down to pages
        self._v2, parent = _parent()
        self._path = parent / f"remoe-edge-{os.getpid()}-{limit_bytes}"
        try:
            self._path.mkdir()
        except OSError as error:
            raise EdgeError(f"{self._path}: {error.strerror}: a memory control group needs root") from None
        try:
            self._set_limit()
        except OSError as error:
            self._path.rmdir()
            raise EdgeError(f"{self._path}: no memory controller in this group ({error.strerror})") from None

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self._path.rmdir()

    def run(self, command: Sequence[str], timeout_s: float) -> Verdict:
        """Run a command inside the group. Raises subprocess.TimeoutExpired."""
        procs = self._path / "cgroup.procs"
        shell = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(procs), *command]
        done = subprocess.run(shell, capture_output=True, text=True, timeout=timeout_s, check=False)
        hits, kills = self._events()
        peak = self._path / ("memory.peak" if self._v2 else "memory.max_usage_in_bytes")
        peak_bytes = int(peak.read_text()) if peak.exists() else None
        return Verdict(done.returncode, done.stdout, done.stderr, self.limit_bytes, peak_bytes, hits, kills)

    def _set_limit(self) -> None:
        (self._path / ("memory.max" if self._v2 else "memory.limit_in_bytes")).write_text(str(self.limit_bytes))
        swap = self._path / "memory.swap.max"
        if self._v2 and swap.exists():
            swap.write_text("0")

    def _events(self) -> tuple[int, int]:
        """(times the limit was met, processes killed for it)."""
        if self._v2:
            events = _pairs(self._path / "memory.events")
            return events["max"], events["oom_kill"]
        kills = _pairs(self._path / "memory.oom_control").get("oom_kill", 0)
        return int((self._path / "memory.failcnt").read_text()), kills


def _parent() -> tuple[bool, Path]:
    """(is it version 2, the group that this process is in)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(",") and _V1_ROOT.is_dir():
            own = _V1_ROOT / path.lstrip("/")
            return False, own if own.is_dir() else _V1_ROOT
    if not (_V2_ROOT / "cgroup.controllers").exists():
        raise EdgeError("no memory control group is mounted below /sys/fs/cgroup")
    return True, _v2_parent()


def _v2_parent() -> Path:
    """The root: a group that holds processes itself (such as our own) can give its children no controller."""
    control = _V2_ROOT / "cgroup.subtree_control"
    try:
        if "memory" not in control.read_text().split():
            control.write_text("+memory")
    except OSError as error:
        raise EdgeError(f"{control}: {error.strerror}: the memory controller cannot be given to a new group") from None
    return _V2_ROOT


def _pairs(file: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in file.read_text().splitlines())}
