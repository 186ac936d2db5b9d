"""The ceiling of everything that streams: how fast this disk reads with O_DIRECT, and how fast it writes.

python -m bench.disk out/demo.bundle       read the blobs of a bundle (or any large files)
python -m bench.disk out/scratch --write   write a scratch file there, and read that
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.common import GB, MB, conclude, interleaved, run_main, say
from profiles.raw_reads import RawReader, page_aligned
from runtime.errors import EdgeError

MIB = 1 << 20
BLOCKS = (1 * MIB, 4 * MIB, 16 * MIB, None)  # None: a whole file at once
THREADS = (1, 2, 4, 8)
_WRITE_BLOCK = 8 * MIB


Setting = tuple[int | None, int]  # block bytes (None: whole files), threads


@dataclass(frozen=True)
class ReadRates:
    """What was read with each setting, bytes/s."""

    readings: dict[Setting, list[float]]

    @property
    def by_setting(self) -> dict[Setting, float]:
        """Medians."""
        return {setting: statistics.median(rates) for setting, rates in self.readings.items()}

    @property
    def best(self) -> float:
        """Rate of the best setting."""
        return max(self.by_setting.values())

    @property
    def best_setting(self) -> Setting:
        """The one with the highest median."""
        medians = self.by_setting
        return max(medians, key=medians.__getitem__)


def measure_reads(
    files: Sequence[Path], bytes_each: int = 256 * MIB, rounds: int = 3, threads: Sequence[int] = THREADS
) -> ReadRates:
    """Rates over all block sizes and `threads`, interleaved, into memory outside the processor's cache.

    Raises UsageError for files that cannot be read.
    """
    reader = RawReader.open(files)
    settings = {f"{block} {count}": (block, count) for block in BLOCKS for count in threads}
    try:
        results = interleaved(
            {
                name: lambda block=block, count=count: reader.rate(block, count, bytes_each)  # type: ignore[misc]
                for name, (block, count) in settings.items()
            },
            rounds,
        )
    finally:
        reader.close()
    return ReadRates({settings[name]: rates for name, rates in results.items()})


@contextlib.contextmanager
def best_reader(files: Sequence[Path], sweep_bytes: int, threads: Sequence[int]) -> Iterator[Callable[[int], float]]:
    """What reads so many bytes with the best setting and says at how many bytes/s, to be called in turn with a rival.

    The setting comes from a sweep of its own: where the readings that choose it rate it, too, a raw reader falls short
    of itself by 1 to 4 % on a restless disk. Raises UsageError for files that cannot be read.
    """
    block, count = measure_reads(files, sweep_bytes, threads=threads).best_setting
    reader = RawReader.open(files)
    try:
        yield lambda total_bytes: reader.rate(block, count, total_bytes)
    finally:
        reader.close()


def measure_write(folder: Path, total_bytes: int = 1024 * MIB) -> float:
    """Bytes per second of writing one file in order, fsync included. Raises EdgeError when the disk is full."""
    path = folder / f"write-{os.getpid()}.scratch"
    try:
        return write_file(path, total_bytes)
    except OSError as error:
        raise EdgeError(f"{path}: {error.strerror}") from None
    finally:
        path.unlink(missing_ok=True)


def write_file(path: Path, total_bytes: int) -> float:
    """Write random bytes with O_DIRECT, fsync; returns bytes per second. Raises OSError."""
    view = page_aligned(_WRITE_BLOCK)
    view[:] = random.Random(0).randbytes(_WRITE_BLOCK)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    try:
        begin, done = time.perf_counter(), 0
        while done < total_bytes:
            done += os.write(descriptor, view)
        os.fsync(descriptor)
        return done / (time.perf_counter() - begin)
    finally:
        os.close(descriptor)


def blob_files(path: Path) -> list[Path]:
    """The expert blobs of a bundle, or the large files of any other folder, or the file itself."""
    if path.is_file():
        return [path]
    blobs = sorted(path.glob("experts/*/*.fp16"))
    return blobs or sorted(f for f in path.rglob("*") if f.is_file() and f.stat().st_size >= MIB)


def print_reads(rates: ReadRates) -> None:
    """A table: a row per block size, a column per number of threads."""
    columns = sorted({count for _, count in rates.by_setting})
    say("read MB/s, O_DIRECT, random order   " + "  ".join(f"{n:>2} thread{'s' if n > 1 else ' '}" for n in columns))
    for block in BLOCKS:
        name = "whole files" if block is None else f"{block // MIB} MiB blocks"
        cells = "  ".join(f"{rates.by_setting[block, n] / MB:10.0f}" for n in columns)
        say(f"  {name:32} {cells}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.disk", description="raw read and write rate of a disk")
    parser.add_argument("path", type=Path, help="a bundle, a file, or a folder on the disk")
    parser.add_argument("--write", action="store_true", help="write a scratch file of 2 GiB in the folder and use that")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    return run_main(lambda: run(options.path, options.write, options.rounds))


def run(path: Path, write: bool, rounds: int) -> None:
    """Measure and print."""
    scratch = path / f"read-{os.getpid()}.scratch"
    write_rate = None
    try:
        if write:
            path.mkdir(parents=True, exist_ok=True)
            write_rate = write_file(scratch, 2048 * MIB)
            say(f"write MB/s, O_DIRECT + fsync, 2 GiB: {write_rate / MB:.0f}")
        rates = measure_reads([scratch] if write else blob_files(path), rounds=rounds)
    except OSError as error:
        raise EdgeError(f"{path}: {error.strerror}") from None
    finally:
        scratch.unlink(missing_ok=True)
    print_reads(rates)
    block, threads = rates.best_setting
    size = "whole files" if block is None else f"{block // MIB} MiB"
    say(f"best: {rates.best / GB:.2f} GB/s ({size}, {threads} threads)")
    table = [{"block_bytes": b, "threads": n, "bytes_per_s": round(r)} for (b, n), r in rates.by_setting.items()]
    conclude("disk", {"read": table, "best_read_bytes_per_s": rates.best, "write_bytes_per_s": write_rate})


if __name__ == "__main__":
    sys.exit(main())
