"""`edge doctor`: is this machine fit? One row per fact, and the cure beside what is wrong."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from edge import console, probe
from edge.checks import ROOT, Check, machine_checks
from edge.disk import disk_checks
from runtime.backends import has_nvidia_gpu
from runtime.errors import UsageError

NAME = "doctor"
HELP = "check this machine: memory, disk, back-ends"
EXAMPLES = """
edge doctor                  the disk of this folder
edge doctor /mnt/nvme        the disk that will hold the bundles
edge doctor --json
"""
_PROBE_S = 180  # loading CUDA for the first time takes a minute on a board
_CURES = {
    "torch cpu": "this torch does not fit the processor: install another build, see TORCH in the Makefile",
    "torch cuda": "this torch has no kernels for this GPU: install the build for its JetPack or CUDA release",
    "compiled": "it is slower without: install a C compiler (gcc), then this package again: pip install -e .",
    "runtime.native": "not for this processor, so engines would end, too: build it anew here: pip install -e .",
    "onnxruntime": "reinstall it: pip uninstall onnxruntime onnxruntime-gpu; pip install 'remoe-edge[onnxruntime]'",
    "tensorrt": "make the environment with --system-site-packages: JetPack installs TensorRT for the system's Python",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder to measure."""
    parser.add_argument("path", metavar="FOLDER", type=Path, nargs="?", default=Path(),
                        help="a folder on the disk to measure (default: this one)")  # fmt: skip
    parser.add_argument("--no-speed", action="store_true", help="leave the disk alone: no scratch file, no reads")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    """Print the rows; 1 when one of them is FAIL."""
    if args.no_speed and args.path != Path():
        raise UsageError(f"--no-speed leaves disks alone: leave {args.path} out, or the option")
    rows = machine_checks()
    if not args.no_speed:
        rows += disk_checks(args.path)
    rows += backend_checks()
    failed = [row.name for row in rows if row.status == "FAIL"]
    if args.json:
        console.print_json({"checks": [asdict(row) for row in rows], "failed": failed})
    else:
        print(format_rows(rows))
    return 1 if failed else 0


def format_rows(rows: list[Check]) -> str:
    """The table, with each cure on a line of its own below its row."""
    lines = console.format_table([[row.status, row.name, row.found] for row in rows]).splitlines()
    cured = zip(lines, (f"      cure: {row.cure}" if row.cure else "" for row in rows), strict=True)
    return "\n".join(line for pair in cured for line in pair if line)


def backend_checks(root: Path = ROOT) -> list[Check]:
    """Each back-end, by running a kernel on it."""
    gpu = has_nvidia_gpu(root)
    rows = [row for library in probe.PROBES for row in _library_checks(library, gpu)]
    if not any(row.name.startswith("torch cuda") for row in rows):
        rows.insert(1, _no_cuda(gpu))
    return rows


def _library_checks(library: str, gpu: bool) -> Iterator[Check]:
    if find_spec(library) is None:
        yield _missing(library, gpu)
        return
    command = [sys.executable, "-I", probe.__file__, library, *sys.path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        yield Check(library, _severity(library), f"gave no answer in {_PROBE_S} s", _cure(library))
        return
    for line in done.stdout.splitlines():
        row = json.loads(line)
        status = "PASS" if row["ok"] else _severity(row["name"])
        yield Check(row["name"], status, row["found"], "" if row["ok"] else _cure(row["name"]))
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended with {done.returncode}"]
        yield Check(library, _severity(library), f"cannot be used: {last[0]}"[:200], _cure(library))


def _severity(name: str) -> Literal["WARN", "FAIL"]:
    """Everything runs on torch's CPU kernels if need be; the rest is speed."""
    return "FAIL" if name in ("torch", "torch cpu") else "WARN"


def _cure(name: str) -> str:
    return next((cure for start, cure in _CURES.items() if name.startswith(start)), _CURES["torch cpu"])


def _missing(library: str, gpu: bool) -> Check:
    if library == "torch":
        return Check("torch", "FAIL", "not installed", "pip install torch")
    if library == "tensorrt":
        return Check(library, "WARN" if gpu else "SKIP", "not installed", _CURES["tensorrt"] if gpu else "")
    return Check(library, "WARN", "not installed", "pip install 'remoe-edge[onnxruntime]'")


def _no_cuda(gpu: bool) -> Check:
    if gpu:
        return Check("torch cuda", "WARN", "there is an NVIDIA GPU that torch does not see", _CURES["torch cuda"])
    return Check("torch cuda", "SKIP", "no NVIDIA GPU")
