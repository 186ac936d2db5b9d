"""`edge calibrate`: this machine as a device profile, which `edge forecast` and `edge simulate --device` take."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from edge import console
from profiles.calibration import MODELS, Models, measure, steps
from profiles.calibration_fit import Host, calibrated
from profiles.device import Device, Figure, Streaming, parse_device
from profiles.device_file import to_toml
from profiles.random_model import SyntheticOptions, save_random_model
from runtime.errors import EdgeError, UsageError
from runtime.machine import describe, device_name, power_mode

NAME = "calibrate"
HELP = "measure this machine into a device profile"
EXAMPLES = """
edge calibrate --out here.toml                    the drive of this folder; takes less than a minute
edge calibrate /mnt/nvme --out board.toml
edge forecast qwen.bundle --device here.toml
"""
_SCRATCH_BYTES = 1_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge calibrate`."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", default=Path(),
                        help="a folder on the drive to measure (default: this one)")  # fmt: skip
    parser.add_argument("--out", metavar="FILE.toml", type=Path, help="the profile (default: standard output)")
    parser.add_argument("--name", default="here", help="what forecasts call it (default: %(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, help="threads of the arithmetic (default: the library's)")
    parser.add_argument("--seconds", metavar="S", type=float, default=0.05,
                        help="per block size, depth and turn of raw reading (default: %(default)s)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, too")


def run(args: argparse.Namespace) -> int:
    """Measure, then write or print the profile. Raises UsageError for a folder that cannot hold the scratch models."""
    if args.out is not None and args.out.suffix != ".toml":
        raise UsageError(f"--out {args.out}: the name of a device profile ends in .toml")
    if not 0 < args.seconds <= 10:
        raise UsageError(f"--seconds {args.seconds}: expected more than 0 and at most 10")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads {args.threads}: expected at least 1")
    if args.out is not None:
        _check_out(args.out)
    begin = time.monotonic()
    with console.Progress(quiet=args.json, unit="steps") as bars:
        device = calibrate(args.folder, args.name, args.threads, args.seconds, bars.update)
    text = to_toml(device, _comment())
    parse_device(text, "the profile")  # what was measured must be readable again
    if args.out is None and not args.json:
        print(text, end="")
    elif args.out is not None:
        _write(args.out, text)
        console.note(f"{args.out}: edge forecast MODEL --device {args.out}")
    console.table(rows(device), title=f"{device.title}, measured in {time.monotonic() - begin:.0f} s")
    if args.json:
        console.print_json({name: figure.value for name, figure in _figures(device).items()})
    return 0


def calibrate(
    folder: Path,
    name: str,
    threads: int | None = None,
    seconds: float = 0.05,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Device:
    """The profile of this host and of the drive under `folder`; what is written there is removed again."""
    total, done = len(MODELS) + steps(), 0

    def tick(_: str) -> None:
        nonlocal done
        progress("calibrate", done, total)
        done += 1

    with _scratch(folder) as scratch:
        models = build_models(Path(scratch), tick)
        rates, runs = measure(models, threads, seconds, tick)
    progress("calibrate", total, total)
    return calibrated(host_of(name), rates, runs, measured_figures())


def build_models(folder: Path, tick: Callable[[str], None]) -> Models:
    """The random models of a calibration, as bundles in `folder`."""
    return {name: _bundle(folder, name, options, tick) for name, options in MODELS.items()}


def rows(device: Device) -> list[list[str]]:
    """What people read of it."""
    overheads, storage = device.overheads, device.storage
    assert overheads is not None
    best = max(device.reads, key=lambda rate: rate.bytes_per_s.value)
    parts = [(name, figure.value) for name, figure in vars(overheads).items()]
    return [
        ["memory", f"{device.memory_read_bytes_per_s.value / 1e9:.1f} GB/s as a decoding engine reads it"],
        ["drive", f"{storage.typical.value / 1e9:.2f} GB/s ({storage.low.value / 1e9:.2f} to "
                  f"{storage.high.value / 1e9:.2f}) at {console.format_bytes(best.block_bytes)} x {best.depth}"],
        ["fixed costs", ", ".join(f"{name.removesuffix('_s')} {1e6 * value:.0f} µs" for name, value in parts)],
        *[_stream(stream) for stream in device.streaming],
    ]  # fmt: skip


def _stream(stream: Streaming) -> list[str]:
    layer, miss = stream.reading_s.value, stream.miss_s.value
    text = f"{stream.read_share.value:.0%} of the drive's own rate; takes {1e6 * layer:.0f} µs of computing per layer"
    text += f" that misses and {1e6 * miss:.0f} µs per miss"
    return [f"blobs of {console.format_bytes(stream.blob_bytes)}", text]


def _scratch(folder: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        free = shutil.disk_usage(folder).free
        if free < _SCRATCH_BYTES:
            wanted, found = console.format_bytes(_SCRATCH_BYTES), console.format_bytes(free)
            raise UsageError(f"{folder}: {found} free, the scratch models take {wanted}: name another folder")
        return tempfile.TemporaryDirectory(prefix=".edge-calibrate-", dir=folder)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}: name a folder you may write to") from None


def _bundle(scratch: Path, name: str, options: SyntheticOptions, tick: Callable[[str], None]) -> Path:
    """A random model, exported like any other."""
    from export.exporter import export_bundle
    from export.settings import ExportOptions

    tick("models")
    checkpoint, bundle = scratch / f"{name}-checkpoint", scratch / f"{name}.bundle"
    try:
        save_random_model(checkpoint, options)
    except OSError as error:
        raise EdgeError(f"{checkpoint}: {error.strerror}") from None
    export_bundle(checkpoint, bundle, ExportOptions(graphs=()))
    shutil.rmtree(checkpoint)
    return bundle


def host_of(name: str) -> Host:
    """This machine before anything is measured."""
    memory, mode = psutil.virtual_memory(), power_mode()
    title = device_name() + (f", power mode {mode}" if mode else "")
    return Host(name, title, memory.total, max(1, memory.total - memory.available))


def measured_figures() -> Callable[[float, str], Figure]:
    """Marks figures with the day, the command and how they were found."""
    words = " ".join(["edge", *sys.argv[1:]]) if sys.argv[1:2] == ["calibrate"] else "edge calibrate"
    day = time.strftime("%Y-%m-%d")
    return lambda value, how: Figure(value, "measured", f"{day}, {words}: {how}")


def _check_out(path: Path) -> None:
    """Before a minute of measuring. Raises UsageError."""
    if path.is_dir():
        raise UsageError(f"--out {path}: is a folder: name a file in it")
    if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"--out {path}: {path.parent} is no folder that can be written to")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def _comment() -> str:
    facts = describe()
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    return f"Measured by edge calibrate, {time.strftime('%Y-%m-%d %H:%M')}, Linux {facts['kernel']}, {versions}."


def _figures(device: Device) -> dict[str, Figure]:
    """Every figure but those of the read curve, by name."""
    groups = [vars(device), vars(device.storage), vars(device.overheads) if device.overheads else {}]
    groups += [{f"{k}_{s.blob_bytes}": v for k, v in vars(s).items()} for s in device.streaming]
    return {name: value for group in groups for name, value in group.items() if isinstance(value, Figure)}
