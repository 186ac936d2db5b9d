"""Export: bundle bytes per second beside the disk's sequential write rate, and the largest memory it took.

python -m bench.export out/synthetic out/synthetic.bundle
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.common import GB, MB, conclude, run_main, say
from bench.disk import measure_write
from runtime.errors import EdgeError, UsageError

_GIB = 1 << 30
_MOST_WRITTEN_BYTES = 4 * _GIB  # for the ceiling: as much as the export writes, since disks are faster in bursts


@dataclass(frozen=True)
class ExportRun:
    """One `edge export` as a process of its own: the whole of it, and the export as the command itself reports it."""

    bundle_bytes: int
    process_s: float
    bytes_per_s: float
    peak_rss_bytes: int


def run_export(checkpoint: Path, out: Path) -> ExportRun:
    """Export with the checkpoint's files out of the page cache. Raises EdgeError when the command fails."""
    for file in checkpoint.glob("*.safetensors"):
        drop_from_page_cache(file)
    begin = time.perf_counter()
    command = [sys.executable, "-m", "edge", "export", str(checkpoint), str(out), "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    answer = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise EdgeError(f"`edge export {checkpoint} {out}` ended with exit code {child.returncode}")
    total = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return ExportRun(total, seconds, json.loads(answer)["bytes_per_s"], usage.ru_maxrss * 1024)


def drop_from_page_cache(file: Path) -> None:
    """Write the file's pages back and forget them."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def largest_tensor_bytes(checkpoint: Path) -> int:
    """Size of the largest tensor, from the headers."""
    from safetensors import safe_open

    item = {"F16": 2, "BF16": 2, "F32": 4}
    largest = 0
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                view = tensors.get_slice(name)
                count = 1
                for size in view.get_shape():
                    count *= size
                largest = max(largest, count * item[view.get_dtype()])
    return largest


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.export", description="export rate and memory")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="bundle to make; it is kept")
    parser.add_argument("--rounds", type=int, default=1, help="exports, each between two measurements of the disk")
    options = parser.parse_args(argv)
    return run_main(lambda: run(options.checkpoint, options.out, options.rounds))


def run(checkpoint: Path, out: Path, rounds: int) -> None:
    """Disk, export, disk, export ... and the figures."""
    if out.exists():
        raise UsageError(f"{out} exists: remove it, or choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    volume = min(_MOST_WRITTEN_BYTES, sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")))
    writes, exports = [measure_write(out.parent, volume)], []
    for number in range(rounds):
        if number:
            shutil.rmtree(out)
        exports.append(run_export(checkpoint, out))
        writes.append(measure_write(out.parent, volume))
    shares = shares_of_ceiling([e.bytes_per_s for e in exports], writes)
    share, ceiling = statistics.median(shares), statistics.median(writes)
    rate = statistics.median(e.bytes_per_s for e in exports)
    whole = statistics.median(e.process_s for e in exports)
    peak = max(e.peak_rss_bytes for e in exports)
    allowed = 1.5 * _GIB + largest_tensor_bytes(checkpoint)
    say(f"ceiling: sequential write {ceiling / MB:.0f} MB/s (of {', '.join(f'{w / MB:.0f}' for w in writes)})")
    say(f"export:  {rate / MB:.0f} MB/s, {exports[0].bundle_bytes / GB:.2f} GB")
    each = ", ".join(f"{s:.0%}" for s in shares)
    say(f"         {share:.0%} of the write rate just before and after (of {each}; aim 60 %)")
    say(f"         {whole:.1f} s for the whole process, start of Python included")
    say(f"memory:  peak {peak / MB:.0f} MB of {allowed / MB:.0f} MB (1.5 GiB and the largest tensor)")
    conclude(
        "export",
        {
            "write_bytes_per_s": writes,
            "exports": [asdict(e) for e in exports],
            "share_of_ceiling": share,
            "shares": shares,
            "allowed_rss_bytes": allowed,
        },
    )


def shares_of_ceiling(rates: Sequence[float], writes: Sequence[float]) -> list[float]:
    """Each export's rate over the mean of the disk's just before and just after it: disks change by the minute."""
    return [rate / statistics.mean(pair) for rate, pair in zip(rates, itertools.pairwise(writes), strict=True)]


if __name__ == "__main__":
    sys.exit(main())
