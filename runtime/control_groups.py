"""The control groups (versions 1 and 2) that this process is in, and what they leave it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT = 1 << 60  # version 1 writes one of 2^63 and a little less


def memory_limits(root: Path = Path("/")) -> list[tuple[str, int]]:
    """Names and limits in bytes, from the process's own group upwards."""
    files = {True: "memory.max", False: "memory.limit_in_bytes"}
    found = ((name, _number(folder / files[second])) for name, folder, second in _groups("memory", root))
    return [(name, size) for name, size in found if size is not None and size < _NO_LIMIT]


def processor_quotas(root: Path = Path("/")) -> list[tuple[str, float]]:
    """Names and cores' worth of time, from the process's own group upwards."""
    found = []
    for name, folder, second in _groups("cpu", root):
        if second:
            quota, _, period = _text(folder / "cpu.max").partition(" ")
        else:
            quota, period = (_text(folder / f"cpu.cfs_{part}_us") for part in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal():  # and not "max", -1, or nothing
            found.append((name, int(quota) / int(period)))
    return found


def _groups(controller: str, root: Path) -> Iterator[tuple[str, Path, bool]]:
    """Name, folder, and whether it is of version 2; a container may not see its parents, so folders may be missing."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts), -1, -1):
            yield "/" + "/".join(parts[:depth]), top.joinpath(*parts[:depth]), controllers == ""


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdecimal() else None


def _text(file: Path) -> str:
    """Empty for a file that is not there: the root group has no limits."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
