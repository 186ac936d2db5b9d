"""What a result must say about the machine that made it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from runtime.control_groups import processor_quotas


def describe() -> dict[str, Any]:
    """Device, cores, kernel, power mode, versions and commit; what cannot be found out is None."""
    usable, cores = core_counts()
    return {
        "device": device_name(),
        "cores": cores,
        "usable_cores": usable,
        "kernel": platform.release(),
        "power_mode": power_mode(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("remoe-edge", "torch", "numpy", "onnxruntime", "tensorrt")},
        "commit": _commit(),
        "command": sys.argv,
    }


def device_name(root: Path = Path("/")) -> str:
    """The board's model from the device tree, or the processor's name."""
    try:
        return (root / "proc/device-tree/model").read_text().strip("\0\n ")
    except OSError:
        pass  # not a board: the processor names itself
    for line in (root / "proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def core_counts() -> tuple[int, int | None]:
    """Processor cores that this process may keep busy, whole ones (taskset and cpusets bind it, a quota of its control
    group ends its time), and those of the machine.
    """
    quotas = [int(cores) for _, cores in processor_quotas()]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas])), os.cpu_count()


def power_mode() -> str | None:
    """The Jetson power mode as nvpmodel names it, or None where there is no nvpmodel."""
    if shutil.which("nvpmodel") is None:
        return None
    answer = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=10, check=False).stdout
    lines = [line.split(":", 1)[1].strip() for line in answer.splitlines() if line.startswith("NV Power Mode:")]
    return lines[0] if lines else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this code runs from; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return answer.stdout.strip() or None
