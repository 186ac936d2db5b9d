"""Decode speed beside its floor, in one run: parts, raw reads, then the engine at several cache sizes.

    python -m bench.decode out/synthetic.bundle --slots 8 16 30 all

Prints TPOT over the schedule floor (bench/floor.py), over active bytes / memory bandwidth where every expert is
resident, the engine's read rate over the best raw one, and what a prefill of 512 tokens reads.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.bandwidth import measure_bandwidth
from bench.common import GB, MB, conclude, run_main, say, set_threads
from bench.disk import MIB, THREADS, blob_files, measure_reads
from bench.floor import Disk, PartCosts, Parts, active_bytes, median_floor
from runtime import backends
from runtime.bundle import Bundle
from runtime.engine import Engine, EngineOptions, GenerateOptions
from runtime.errors import UsageError
from runtime.options import DTYPES
from runtime.records import TokenRecord

PREFILL_TOKENS = 512
_PROMPT_TOKENS = 16
_READ_BYTES = 192 * MIB


@dataclass(frozen=True)
class DecodeOptions:
    """What to run. `slots` are slots per layer; an entry equal to the number of experts is "all resident"."""

    slots: tuple[int, ...]
    tokens: int = 48
    rounds: int = 3
    backend: str = "auto"
    dtype: str = "fp16"
    threads: int | None = None
    read_threads: int = EngineOptions.read_threads


@dataclass(frozen=True)
class Setting:
    """One cache size: medians over rounds."""

    slots_per_layer: int
    tpot_s: float
    floor_s: float
    hit_rate: float
    read_bytes_per_s: float | None
    raw_bytes_per_s: float

    @property
    def over_floor(self) -> float:
        """TPOT over the schedule floor."""
        return self.tpot_s / self.floor_s


@dataclass(frozen=True)
class Round:
    """One round of a setting: what was decoded, and the ceilings measured just before."""

    records: list[TokenRecord]
    costs: PartCosts
    floor_s: float
    raw_bytes_per_s: float


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    """Token ids drawn at random: a random model repeats itself less after them."""
    generator = random.Random(seed)
    return [generator.randrange(vocab_size) for _ in range(count)]


def decode(engine: Engine, tokens: int, seed: int) -> list[TokenRecord]:
    """Records of the decode steps after a short random prompt, the first (cold) few left out."""
    prompt = random_ids(engine.config.vocab_size, _PROMPT_TOKENS, seed)
    options = GenerateOptions(max_new_tokens=tokens, temperature=1.0, seed=seed, ignore_eos=True)
    return [token.record for token in engine.generate(prompt, options)][4:]


def measure_setting(bundle: Bundle, parts: Parts, options: DecodeOptions, slots: int) -> tuple[Setting, PartCosts]:
    """Raw reads, parts and decode in turn, `rounds` times. Raises BudgetError when the cache does not fit."""
    settings = EngineOptions(
        backend=options.backend,  # type: ignore[arg-type]
        dtype=options.dtype,  # type: ignore[arg-type]
        slots_per_layer=slots,
        read_threads=options.read_threads,
        context=PREFILL_TOKENS,
    )
    rounds = []
    with Engine.open(bundle.path, settings) as engine:
        if slots >= engine.config.router.num_experts:
            _fill(engine)
        for number in range(options.rounds):
            raw = measure_reads(blob_files(bundle.path), _READ_BYTES, rounds=1, threads=THREADS[1:]).best
            costs = parts.measure()
            records = decode(engine, options.tokens, seed=number)
            floor = median_floor(costs, Disk(engine.slot_bytes, raw), records)
            rounds.append(Round(records, costs, floor, raw))
    return _setting(slots, rounds), _median_parts([r.costs for r in rounds])


def prefill_reads(bundle: Path, options: DecodeOptions) -> dict[str, Any]:
    """What a cold prefill of 512 tokens reads: blobs per layer, never more than there are, and each once."""
    slots = min(options.slots)
    with Engine.open(bundle, EngineOptions(slots_per_layer=slots, context=PREFILL_TOKENS + 1)) as engine:
        prompt = random_ids(engine.config.vocab_size, PREFILL_TOKENS, seed=1)
        run = engine.generate(prompt, GenerateOptions(max_new_tokens=1, ignore_eos=True))
        record = next(iter(run)).record
        run.close()  # type: ignore[attr-defined]
        needed = [hits + misses for hits, misses in zip(record.hits, record.misses, strict=True)]
        return {
            "tokens": PREFILL_TOKENS,
            "slots_per_layer": slots,
            "experts_needed_by_layer": needed,
            "blobs_read_by_layer": record.misses,
            "each_once": record.bytes == sum(record.misses) * engine.slot_bytes
            and max(needed) <= engine.config.router.num_experts,
            "read_bytes": record.bytes,
            "ttft_ms": record.total_ms,
        }


def _fill(engine: Engine) -> None:
    """Read every expert: prompts until a token misses nothing."""
    for seed in range(8):
        prompt = random_ids(engine.config.vocab_size, PREFILL_TOKENS - 1, seed)
        for token in engine.generate(prompt, GenerateOptions(max_new_tokens=1, ignore_eos=True)):
            if not sum(token.record.misses):
                return
    raise UsageError("random prompts never used every expert: this bundle's routing cannot be measured all-resident")


def _setting(slots: int, rounds: Sequence[Round]) -> Setting:
    records = [record for r in rounds for record in r.records]
    hits, misses = sum(sum(r.hits) for r in records), sum(sum(r.misses) for r in records)
    busy = sum(r.read_busy_ms for r in records) / 1000
    return Setting(
        slots_per_layer=slots,
        tpot_s=statistics.median(statistics.median(t.total_ms for t in r.records) for r in rounds) / 1000,
        floor_s=statistics.median(r.floor_s for r in rounds),
        hit_rate=hits / (hits + misses),
        read_bytes_per_s=sum(r.bytes for r in records) / busy if misses else None,
        raw_bytes_per_s=statistics.median(r.raw_bytes_per_s for r in rounds),
    )


def _median_parts(parts: Sequence[PartCosts]) -> PartCosts:
    names = PartCosts.__dataclass_fields__
    return PartCosts(**{name: statistics.median(getattr(p, name) for p in parts) for name in names})


def run(path: Path, options: DecodeOptions) -> None:
    """Measure every setting and print."""
    set_threads(options.threads)
    bundle = Bundle.open(path)
    bandwidth = measure_bandwidth().best
    weights, experts = active_bytes(bundle.config), bundle.config.router.num_experts
    least = weights / bandwidth
    say(f"ceiling: memory {bandwidth / GB:.1f} GB/s with {torch.get_num_threads()} threads")
    say(f"         {weights / MB:.0f} MB of weights per token take {least * 1e3:.1f} ms at the least")
    parts = Parts(bundle, backends.choose(options.backend)[0], DTYPES[options.dtype])
    rows = []
    for slots in options.slots:
        setting, costs = measure_setting(bundle, parts, options, min(slots, experts))
        rows.append({**asdict(setting), "over_floor": setting.over_floor, **asdict(costs)})
        _print_setting(setting, costs, least, experts)
    prefill = prefill_reads(path, options)
    say(f"prefill of {PREFILL_TOKENS} tokens, cold, {prefill['slots_per_layer']} slots per layer:")
    say(f"  experts needed {prefill['experts_needed_by_layer']}, blobs read {prefill['blobs_read_by_layer']}")
    say(f"  {prefill['ttft_ms']:.0f} ms, {prefill['read_bytes'] / prefill['ttft_ms'] / 1e6:.2f} GB/s")
    result = {"bundle": str(path), "options": asdict(options), "memory_bytes_per_s": bandwidth, "memory_floor_s": least}
    conclude("decode", {**result, "settings": rows, "prefill": prefill})
    bundle.close()


def _print_setting(s: Setting, c: PartCosts, least: float, experts: int) -> None:
    say(f"{s.slots_per_layer} of {experts} slots per layer, hit rate {s.hit_rate:.2f}")
    say(
        f"  parts:  head {c.head_s * 1e3:.2f}, block {c.block_s * 1e3:.2f}, shared {c.shared_s * 1e3:.2f}, "
        f"expert {c.expert_s * 1e3:.2f} ms; raw read {s.raw_bytes_per_s / GB:.2f} GB/s"
    )
    say(f"  floor:  {s.floor_s * 1e3:.1f} ms by the schedule")
    say(f"  TPOT:   {s.tpot_s * 1e3:.1f} ms = {s.over_floor:.2f} x the schedule floor (aim 1.2)")
    if s.slots_per_layer == experts:
        say(f"          {s.tpot_s / least:.2f} x active bytes / memory bandwidth (aim 1.3)")
    if s.read_bytes_per_s is not None:
        share = s.read_bytes_per_s / s.raw_bytes_per_s
        say(f"  reads:  {s.read_bytes_per_s / GB:.2f} GB/s = {share:.0%} of the best raw rate (aim 90 %)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description="decode speed beside its floor")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--slots", nargs="+", default=["8", "16", "30", "all"], help="slots per layer, or all")
    parser.add_argument("--tokens", type=int, default=DecodeOptions.tokens)
    parser.add_argument("--rounds", type=int, default=DecodeOptions.rounds)
    parser.add_argument("--backend", default=DecodeOptions.backend)
    parser.add_argument("--dtype", default=DecodeOptions.dtype)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--read-threads", type=int, default=DecodeOptions.read_threads)
    options = vars(parser.parse_args(argv))
    path = options.pop("bundle")
    return run_main(lambda: run(path, DecodeOptions(**{**options, "slots": parse_slots(options["slots"])})))


def parse_slots(words: Sequence[str]) -> tuple[int, ...]:
    """ "8", "all" to numbers; all is more than any model has. Raises UsageError."""
    wrong = [word for word in words if word != "all" and not word.isdecimal()]
    if wrong:
        raise UsageError(f"--slots {wrong[0]}: expected a number or all")
    return tuple(1 << 20 if word == "all" else int(word) for word in words)


if __name__ == "__main__":
    sys.exit(main())
