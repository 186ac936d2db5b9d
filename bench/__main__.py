"""Every benchmark in turn, on a random checkpoint of the shape of Qwen1.5-MoE-A2.7B: `python -m bench --out out/bench`

Takes about 1.2 GB of disk and 1.2 GB of memory (or disk) per layer, and ten minutes with the default of 4 layers. The
checkpoint and the bundle are removed at the end unless --keep is given.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from bench import bandwidth, decode, disk, export, memory_limit, record, synthetic
from bench.common import run_main, say
from runtime.errors import EdgeError, UsageError

_MEMORY = Path("/dev/shm")
_LAYER_BYTES, _OTHER_BYTES = 1_200_000_000, 300_000_000  # of the synthetic checkpoint


def run(out: Path, layers: int, keep: bool) -> None:
    """All of them."""
    checkpoint, bundle = _source_folder(out, layers) / "remoe-edge-bench-checkpoint", out / "synthetic.bundle"
    for folder in (checkpoint, bundle):
        if folder.exists():
            raise UsageError(f"{folder} exists: remove it, or choose another --out")
    try:
        _section("synthetic checkpoint")
        synthetic.run(checkpoint, synthetic.SyntheticOptions(layers=layers))
        _section("export")
        export.run(checkpoint, bundle, rounds=3)
        shutil.rmtree(checkpoint)
        _section("disk")
        disk.run(bundle, write=False, rounds=3)
        _section("memory bandwidth")
        bandwidth.run(None)
        _section("decode")
        decode.run(bundle, decode.DecodeOptions(slots=decode.parse_slots(["8", "16", "30", "all"])))
        _section("recording")
        record.run(bundle, record.RecordOptions())
        _section("memory limit")
        try:
            memory_limit.run(bundle, memory_limit.LimitOptions(slots=8, tokens=200))
        except EdgeError as error:
            say(f"not measured: {error}")
    finally:
        if not keep:
            shutil.rmtree(checkpoint, ignore_errors=True)
            shutil.rmtree(bundle, ignore_errors=True)


def _source_folder(out: Path, layers: int) -> Path:
    """Memory, where there is plenty: then reading the checkpoint does not compete with writing the bundle."""
    needed = layers * _LAYER_BYTES + _OTHER_BYTES
    memory = psutil.virtual_memory().available
    if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > needed and memory > 3 * needed:
        say(f"the checkpoint lies in memory ({_MEMORY}): export reads it without touching the disk")
        return _MEMORY
    say("the checkpoint lies on the disk that export writes to: its reads and writes share that disk")
    return out


def _section(title: str) -> None:
    say(f"\n== {title}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="every benchmark, each beside its ceiling")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for checkpoint and bundle")
    parser.add_argument(
        "--layers", type=int, default=4, help="layers of the model, 1.2 GB of disk and of memory each (default: 4)"
    )
    parser.add_argument("--keep", action="store_true", help="keep checkpoint and bundle")
    options = parser.parse_args(argv)
    return run_main(lambda: run(options.out, options.layers, options.keep))


if __name__ == "__main__":
    sys.exit(main())
