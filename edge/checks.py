"""What `edge doctor` looks at on the machine itself. `root` stands for / and is a fake tree in tests."""

from __future__ import annotations

import platform
import re
import resource
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import psutil

from edge.console import format_bytes
from runtime.machine import device_name, power_mode
from runtime.memory import OVERHEAD_BYTES, limit

Status = Literal["PASS", "WARN", "FAIL", "SKIP"]
ROOT = Path("/")
_SMALL_MEMORY_BYTES = 4 << 30
_OPEN_FILES = 8192  # the largest model that is supported has 48 x 128 experts, each an open file
_SLOW_MODES = ("10W", "15W")  # half of the GPU's cores are off


@dataclass(frozen=True)
class Check:
    """One row. `cure` says what to do, and is empty where nothing is to be done. SKIP: not on this machine."""

    name: str
    status: Status
    found: str
    cure: str = ""


def machine_checks(root: Path = ROOT) -> list[Check]:
    """Everything but disk and back-ends."""
    jetson = _jetson_release(root)
    rows = [python_check(sys.version_info[:2]), device_check(root, jetson)]
    if jetson:
        rows.append(power_check(power_mode()))
    return [
        *rows,
        memory_check(*limit()),
        swap_check(psutil.swap_memory().total, psutil.swap_memory().used),
        huge_pages_check(root),
        open_files_check(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        telemetry_check(bool(jetson), shutil.which("tegrastats") is not None, find_spec("jtop") is not None),
    ]


def python_check(version: tuple[int, int]) -> Check:
    """The interpreter."""
    found = f"{platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}"
    if (3, 10) <= version < (3, 14):
        return Check("python", "PASS", found)
    return Check("python", "FAIL", found, "use Python 3.10 to 3.13: make venv PYTHON=python3.12")


def device_check(root: Path, release: str) -> Check:
    """The board or processor; `release` is the Jetson's L4T release."""
    name = device_name(root)
    return Check("device", "PASS", f"{name}, L4T {release}" if release else name)


def power_check(mode: str | None) -> Check:
    """The power mode of a Jetson."""
    if mode is None:
        return Check("power mode", "WARN", "nvpmodel does not answer", "sudo nvpmodel -q shows why")
    if mode in _SLOW_MODES:
        return Check("power mode", "WARN", f"{mode}: part of the GPU is off", "sudo nvpmodel -m 0; sudo jetson_clocks")
    return Check("power mode", "PASS", mode)


def memory_check(size_bytes: int, source: str) -> Check:
    """What this process may use."""
    found = f"{format_bytes(size_bytes)} ({source})"
    if size_bytes < 2 * OVERHEAD_BYTES:
        least = format_bytes(2 * OVERHEAD_BYTES)
        return Check("memory", "FAIL", found, f"even a small model needs {least}: end other programs, raise the limit")
    if size_bytes < _SMALL_MEMORY_BYTES:
        return Check("memory", "WARN", found, "enough for small models only: end other programs, stop the desktop")
    return Check("memory", "PASS", found)


def swap_check(total_bytes: int, used_bytes: int) -> Check:
    """Swap in use means that something, maybe the expert cache, is read from disk twice."""
    if total_bytes == 0:
        return Check("swap", "PASS", "none")
    found = f"{format_bytes(used_bytes)} of {format_bytes(total_bytes)} in use"
    if used_bytes > total_bytes // 4:
        return Check("swap", "WARN", found, "end other programs, then: sudo swapoff -a && sudo swapon -a")
    return Check("swap", "PASS", found)


def huge_pages_check(root: Path) -> Check:
    """The expert cache asks for transparent huge pages."""
    file = root / "sys/kernel/mm/transparent_hugepage/enabled"
    cure = f"echo madvise | sudo tee /{file.relative_to(root)}"
    try:
        text = file.read_text()
    except OSError as error:
        return Check("huge pages", "WARN", f"this kernel has none ({error.strerror})", "reads will be slower")
    chosen = re.search(r"\[(\w+)\]", text)
    mode = chosen[1] if chosen else text.strip()
    if mode in ("always", "madvise"):
        return Check("huge pages", "PASS", mode)
    return Check("huge pages", "WARN", f"{mode}: reads are slower", cure)


def open_files_check(hard_limit: int) -> Check:
    """Every expert blob is an open file."""
    if hard_limit == resource.RLIM_INFINITY or hard_limit >= _OPEN_FILES:
        count = "unlimited" if hard_limit == resource.RLIM_INFINITY else str(hard_limit)
        return Check("open files", "PASS", count)
    return Check(
        "open files", "WARN", f"at most {hard_limit}", f"one per expert: ulimit -Hn {_OPEN_FILES} as root, then log in"
    )


def telemetry_check(jetson: bool, tegrastats: bool, jtop: bool) -> Check:
    """Sources of power and temperature on a Jetson."""
    sources = [name for name, present in (("tegrastats", tegrastats), ("jtop", jtop)) if present]
    if sources:
        return Check("telemetry", "PASS", ", ".join(sources))
    if jetson:
        cure = "tegrastats comes with JetPack (nvidia-l4t-tools); pip install 'remoe-edge[board]' brings jtop"
        return Check("telemetry", "WARN", "neither tegrastats nor jtop", cure)
    return Check("telemetry", "SKIP", "tegrastats and jtop are for Jetson boards")


def _jetson_release(root: Path) -> str:
    """ "36.4.3" of a Jetson, "" elsewhere."""
    try:
        text = (root / "etc/nv_tegra_release").read_text()
    except OSError:
        return ""
    found = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else text.strip()[:40]
