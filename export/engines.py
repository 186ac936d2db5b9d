"""A bundle's graphs to TensorRT engines: one block at a time, each in a process of its own, kept in the private store.

What is in the store already is not built again, so an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from export import engine_worker
from runtime.bundle import Bundle
from runtime.engine_store import EngineKey, EngineLimits, EngineStore, Target, engine_keys
from runtime.errors import BudgetError, EdgeError, UsageError
from runtime.graph_io import weight_files
from runtime.memory import limit

CHECK_CAPABILITY = "86"  # the nearest to Orin's 8.7 that TensorRT-RTX builds for
# What building one part was seen to take: parsed weights, their copies and the engine, beside the library itself.
BASE_BYTES, BYTES_PER_WEIGHT_BYTE = 600_000_000, 4
_SAMPLE_S = 0.05


@dataclass(frozen=True)
class PartResult:
    """One row of the table. `reused`: it was in the store; seconds and peak are then those of its building."""

    part: str
    seconds: float
    engine_bytes: int
    peak_bytes: int
    layers: int
    weight_bytes: int
    reused: bool


Progress = Callable[[PartResult, int, int], None]  # what is done, parts done, parts in all


def part_weight_bytes(bundle: Bundle, part: str) -> int:
    """Bytes of the files that hold a part's weights."""
    return sum(bundle.manifest.files[file].bytes for file in weight_files(bundle.config, part))


def estimate_bytes(weight_bytes: int, options: EngineLimits) -> int:
    """Memory that building one part may take."""
    return BASE_BYTES + BYTES_PER_WEIGHT_BYTE * weight_bytes + options.workspace_bytes


def check_memory(bundle: Bundle, options: EngineLimits, parts: Iterator[str] | list[str]) -> int:
    """The estimate of the largest of `parts`. Raises BudgetError, with the sum, when this machine has less free."""
    sizes = {part: part_weight_bytes(bundle, part) for part in parts}
    if not sizes:
        return 0
    part = max(sizes, key=sizes.__getitem__)
    needed, (free, what) = estimate_bytes(sizes[part], options), limit()
    if needed > free:
        raise BudgetError(
            f"building {part} may take {BASE_BYTES / 1e6:.0f} + {BYTES_PER_WEIGHT_BYTE} x {sizes[part] / 1e6:.0f} of "
            f"weights + {options.workspace_bytes / 1e6:.0f} of workspace = {needed / 1e6:.0f} MB, but {what} leaves "
            f"{free / 1e6:.0f} MB: end other programs, stop the desktop, or give less with --workspace"
        )
    return needed


def build_engines(
    bundle: Bundle, target: Target, options: EngineLimits, store: EngineStore, progress: Progress
) -> list[PartResult]:
    """Build every part that the store does not have. Raises EdgeError naming the part; what was built stays."""
    keys, results = engine_keys(bundle, target, options), []
    with store.locked():
        missing = [part for part, key in keys.items() if store.find(key) is None]
        check_memory(bundle, options, missing)
        for part, key in keys.items():
            stored = store.find(key)
            facts = stored.facts if stored else _build_into(store, key, bundle, target)
            size = stored.bytes if stored else facts.pop("engine_bytes")
            results.append(_result(bundle, part, facts, size, reused=stored is not None))
            progress(results[-1], len(results), len(keys))
    return results


def check_engines(bundle: Bundle, target: Target, options: EngineLimits, progress: Progress) -> list[PartResult]:
    """Build every part, the expert's graph too, and keep nothing: the proof that the graphs compile."""
    parts, results = [*engine_keys(bundle, target, options), "expert"], []
    check_memory(bundle, options, parts)
    timing_cache = b""
    with tempfile.TemporaryDirectory(prefix="remoe-engines-") as folder:
        for part in parts:
            out = Path(folder) / "engine"
            facts = _run_worker(_request(bundle, part, target, options, out, timing_cache))
            timing_cache = bytes.fromhex(facts.pop("timing_cache"))
            results.append(_result(bundle, part, facts, out.stat().st_size, reused=False))
            progress(results[-1], len(results), len(parts))
    return results


def _build_into(store: EngineStore, key: EngineKey, bundle: Bundle, target: Target) -> dict[str, Any]:
    out = store.begin(key)
    request = _request(bundle, key.part, target, key.options, out, store.read_timing_cache(key))
    facts = _run_worker(request)
    timings = bytes.fromhex(facts.pop("timing_cache"))
    if timings:
        store.write_timing_cache(key, timings)
    return {**facts, "engine_bytes": store.commit(key, facts).bytes}


def _request(
    bundle: Bundle, part: str, target: Target, options: EngineLimits, out: Path, timing_cache: bytes
) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path.absolute()),
        "part": part,
        "flavour": target.flavour,
        "options": asdict(options),
        "compute_capability": target.capability,
        "out": str(out),
        "timing_cache": timing_cache.hex(),
    }


def _run_worker(request: dict[str, Any]) -> dict[str, Any]:
    """The worker's facts, with the memory it was seen to take. Raises what the worker raised."""
    command = [sys.executable, "-I", engine_worker.__file__, *sys.path]
    with _lowest_free(unified=request["compute_capability"] is None) as taken:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise EdgeError(f"{request['part']}: {_ending(done)}")
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise (UsageError if answer["usage"] else EdgeError)(answer["error"])
    facts = answer["ok"]
    facts["peak_bytes"] = max(facts.pop("peak_rss_bytes"), taken[0])
    return dict(facts)


def _ending(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode == -signal.SIGKILL:
        return (
            "the builder was killed, most likely because memory ran out (see dmesg): end other programs, or give less "
            "with --workspace, and run the same command again: it resumes"
        )
    last = done.stderr.strip().splitlines()[-1:] or ["without a word"]
    return f"the builder ended with {done.returncode}: {last[0][:300]}: run the same command again: it resumes"


@contextmanager
def _lowest_free(unified: bool) -> Iterator[list[int]]:
    """How far the free memory falls while the block runs, bytes: on a board GPU memory is the machine's memory, and no
    process's own figure shows it. 0 where only the process's own figure counts.
    """
    taken, stop = [0], threading.Event()

    def watch() -> None:
        before = psutil.virtual_memory().available
        while not stop.wait(_SAMPLE_S):
            taken[0] = max(taken[0], before - psutil.virtual_memory().available)

    thread = threading.Thread(target=watch, daemon=True)
    if unified:
        thread.start()
    try:
        yield taken
    finally:
        stop.set()
        if unified:
            thread.join()


def _result(bundle: Bundle, part: str, facts: dict[str, Any], size: int, reused: bool) -> PartResult:
    return PartResult(
        part, facts["seconds"], size, facts["peak_bytes"], facts["layers"], part_weight_bytes(bundle, part), reused
    )
