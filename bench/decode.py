"""Decode speed beside its floor, in one run: parts, raw reads, then the engine at several cache sizes.

    python -m bench.decode out/synthetic.bundle --slots 8 16 30 all

Prints TPOT over the schedule floor (profiles/floor.py), with guesses of what the next layer will want, the default on a
CPU, and without (the floor knows of none, so guesses may go below it), over active bytes / memory bandwidth where every
expert is resident, the rate of the engine's reads over the best raw one, by themselves and while tokens are decoded
(between its bursts the disk falls idle, and arithmetic wants memory and processor, too), and what a prefill of 512
tokens reads.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import GB, MB, conclude, run_main, say, set_threads
from bench.disk import MIB, THREADS, best_reader, blob_files
from profiles.bandwidth import Bandwidth, BandwidthReader, field_medians
from profiles.floor import Disk, PartCosts, Parts, active_bytes, median_floor
from profiles.random_model import decode_random, random_ids
from runtime import backends
from runtime.bundle import Bundle
from runtime.engine import Engine, EngineOptions, GenerateOptions
from runtime.errors import UsageError
from runtime.options import DTYPES
from runtime.records import TokenRecord

PREFILL_TOKENS = 512
# The rates of a disk and of a memory that others use, too, move by some 10 % from one reading to the next, and within
# seconds: many readings, all in turn with tokens.
_READ_BYTES, _READINGS = 128 * MIB, 4
_TURN_TOKENS = 12  # between readings
_ALONE_READINGS = 64


@dataclass(frozen=True)
class DecodeOptions:
    """What to run. `slots` are slots per layer; an entry equal to the number of experts is "all resident"."""

    slots: tuple[int, ...]
    tokens: int = 48
    rounds: int = 5
    backend: str = "auto"
    dtype: str = "fp16"
    threads: int | None = None
    read_threads: int = EngineOptions.read_threads
    prefetch: int = 1


@dataclass(frozen=True)
class Round:
    """One round of a cache size: what was decoded, and the ceilings measured around it; `guessed`: the same tokens with
    guesses, None without.
    """

    records: list[TokenRecord]
    guessed: list[TokenRecord] | None
    costs: PartCosts
    slot_bytes: int
    raw_bytes_per_s: float  # this and the ceilings beside it: medians of readings before, between and after
    memory_floor_s: float

    @property
    def floor_s(self) -> float:
        """The schedule floor with this disk."""
        return median_floor(self.costs, Disk(self.slot_bytes, self.raw_bytes_per_s), self.records)

    @property
    def tpot_s(self) -> float:
        """Median seconds per token."""
        return _tpot_s(self.records)

    @property
    def guessed_tpot_s(self) -> float | None:
        """The same with guesses."""
        return None if self.guessed is None else _tpot_s(self.guessed)

    @property
    def read_bytes_per_s(self) -> float | None:
        """Rate while at least one blob was on its way; None when nothing was read."""
        return _read_rate(self.records)

    @property
    def guessed_read_bytes_per_s(self) -> float | None:
        """The same with guesses, wrong ones included."""
        return _read_rate(self.guessed or [])

    @property
    def hit_rate(self) -> float:
        """Share of the wanted experts that were resident."""
        hits, misses = (sum(sum(getattr(r, name)) for r in self.records) for name in ("hits", "misses"))
        return hits / (hits + misses)


@dataclass(frozen=True)
class Setting:
    """One cache size, medians over rounds; shares are taken within a round first."""

    slots_per_layer: int
    hit_rate: float
    tpot_s: float
    floor_s: float
    over_floor: float
    prefetch_tpot_s: float | None
    prefetch_over_floor: float | None
    prefetch_read_share: float | None
    prefetched_share: float | None  # of the misses: guessed
    wasted_share: float | None  # of the bytes that were read with guesses: for wrong ones
    memory_floor_s: float
    over_memory_floor: float
    raw_bytes_per_s: float
    read_bytes_per_s: float | None
    read_share: float | None
    alone_share: float | None
    parts: PartCosts


def measure_setting(bundle: Bundle, parts: Parts, options: DecodeOptions, slots: int) -> Setting:
    """Ceilings and decode in turn, `rounds` times. Raises BudgetError when a cache does not fit, or two of them."""
    plain = EngineOptions(
        backend=options.backend,  # type: ignore[arg-type]
        dtype=options.dtype,  # type: ignore[arg-type]
        slots_per_layer=slots,
        prefetch=0,
        read_threads=options.read_threads,
        context=PREFILL_TOKENS,
    )
    with contextlib.ExitStack() as held:
        engine, guessing = held.enter_context(Engine.open(bundle.path, plain)), None
        if slots >= engine.config.router.num_experts:
            _fill(engine)
        elif options.prefetch:
            guesses = dataclasses.replace(plain, prefetch=options.prefetch)
            guessing = held.enter_context(Engine.open(bundle.path, guesses))
        raw = held.enter_context(best_reader(blob_files(bundle.path), _READ_BYTES, THREADS[1:]))
        alone = alone_share(engine, raw)
        memory, seeds = BandwidthReader(), range(options.rounds)
        rounds = [_round(engine, guessing, _Ceilings(raw, memory, parts), options.tokens, seed) for seed in seeds]
        return summarise(slots, alone, rounds)


def summarise(slots: int, alone_share: float | None, rounds: Sequence[Round]) -> Setting:
    """Medians over rounds."""
    raws, floors = [r.raw_bytes_per_s for r in rounds], [r.floor_s for r in rounds]

    def middle(value: Callable[[Round], float]) -> float:
        return statistics.median(value(r) for r in rounds)

    def share(value: Callable[[Round], float | None], of: Sequence[float]) -> float | None:
        found = [got / whole for r, whole in zip(rounds, of, strict=True) if (got := value(r))]
        return statistics.median(found) if found else None

    reads = [rate for r in rounds if (rate := r.read_bytes_per_s)]
    times = [time for r in rounds if (time := r.guessed_tpot_s)]
    guessed = [record for r in rounds for record in r.guessed or ()]
    return Setting(
        slots_per_layer=slots,
        hit_rate=middle(lambda r: r.hit_rate),
        tpot_s=middle(lambda r: r.tpot_s),
        floor_s=statistics.median(floors),
        over_floor=statistics.median(r.tpot_s / floor for r, floor in zip(rounds, floors, strict=True)),
        prefetch_tpot_s=statistics.median(times) if times else None,
        prefetch_over_floor=share(lambda r: r.guessed_tpot_s, floors),
        prefetch_read_share=share(lambda r: r.guessed_read_bytes_per_s, raws),
        prefetched_share=_share(guessed, lambda r: r.prefetched, lambda r: sum(r.misses)),
        wasted_share=_share(guessed, lambda r: r.wasted_bytes, lambda r: r.bytes),
        memory_floor_s=middle(lambda r: r.memory_floor_s),
        over_memory_floor=middle(lambda r: r.tpot_s / r.memory_floor_s),
        raw_bytes_per_s=statistics.median(raws),
        read_bytes_per_s=statistics.median(reads) if reads else None,
        read_share=share(lambda r: r.read_bytes_per_s, raws),
        alone_share=alone_share,
        parts=field_medians([r.costs for r in rounds]),
    )


def _tpot_s(records: Sequence[TokenRecord]) -> float:
    return statistics.median(record.total_ms for record in records) / 1000


def _read_rate(records: Sequence[TokenRecord]) -> float | None:
    busy_s = sum(record.read_busy_ms for record in records) / 1000
    return sum(record.bytes for record in records) / busy_s if busy_s else None


def _share(
    records: Sequence[TokenRecord], part: Callable[[TokenRecord], int], whole: Callable[[TokenRecord], int]
) -> float | None:
    total = sum(map(whole, records))
    return sum(map(part, records)) / total if total else None


@dataclass
class _Ceilings:
    """What disk, memory and processor give, read again and again in turn with tokens."""

    raw: Callable[[int], float]
    memory: BandwidthReader
    parts: Parts
    rates: list[float] = field(default_factory=list)
    bandwidths: list[Bandwidth] = field(default_factory=list)
    costs: list[PartCosts] = field(default_factory=list)

    def read(self) -> None:
        """Each of them."""
        self.rates += [self.raw(_READ_BYTES) for _ in range(_READINGS)]
        self.bandwidths.append(self.memory.read())
        self.costs.append(self.parts.measure())


def _round(engine: Engine, guessing: Engine | None, ceilings: _Ceilings, tokens: int, seed: int) -> Round:
    ceilings.read()
    streams = [decode_random(rival, tokens, seed) for rival in (engine, guessing) if rival is not None]
    records: list[list[TokenRecord]] = [[] for _ in streams]
    for _ in range(0, tokens, _TURN_TOKENS):
        for stream, own in zip(streams, records, strict=True):
            own += itertools.islice(stream, _TURN_TOKENS)
        ceilings.read()
    return Round(
        records=records[0],
        guessed=records[1] if guessing else None,
        costs=field_medians(ceilings.costs),
        slot_bytes=engine.slot_bytes,
        raw_bytes_per_s=statistics.median(ceilings.rates),
        memory_floor_s=active_bytes(engine.config) / field_medians(ceilings.bandwidths).best,
    )


def alone_share(engine: Engine, raw: Callable[[int], float]) -> float | None:
    """Rate of the engine's reads over the best raw one, in turn, while nothing is computed; None where a layer misses
    fewer experts than a token takes.
    """
    rules, cache = engine.config.router, engine.decoder.cache
    if min(int((~cache.held(layer)).sum()) for layer in engine.config.moe_layers) < rules.top_k:
        return None
    chooser = np.random.default_rng(0)
    return statistics.median(_read_misses(engine, chooser) / raw(_READ_BYTES) for _ in range(_ALONE_READINGS))


def _read_misses(engine: Engine, chooser: np.random.Generator) -> float:
    """Bytes per second of requests for as many missing experts as a token can miss in a layer, one after the other,
    checked and in their slots: while a blob is on its way, as records tell it.
    """
    cache, read_bytes, busy_ns = engine.decoder.cache, 0, 0
    while read_bytes < _READ_BYTES:
        layer = int(chooser.choice(engine.config.moe_layers))
        missing = np.flatnonzero(~cache.held(layer))
        wanted = chooser.choice(missing, engine.config.router.top_k, replace=False).tolist()
        with cache.fetch(layer, wanted) as request:
            busy_ns -= request.loader.busy_ns()
            for _ in request:
                pass
            busy_ns += request.loader.busy_ns()
        read_bytes += len(wanted) * engine.slot_bytes
    cache.take_stats()  # of no token
    return 1e9 * read_bytes / busy_ns


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


def run(path: Path, options: DecodeOptions) -> None:
    """Measure every setting and print."""
    set_threads(options.threads)
    bundle = Bundle.open(path)
    experts = bundle.config.router.num_experts
    parts = Parts.load(bundle, backends.choose(options.backend)[0], DTYPES[options.dtype])
    say(f"a token's weights: {active_bytes(bundle.config) / MB:.0f} MB; {torch.get_num_threads()} threads")
    settings = []
    for slots in options.slots:
        settings.append(measure_setting(bundle, parts, options, min(slots, experts)))
        _print_setting(settings[-1], experts)
    bundle.close()
    prefill = prefill_reads(path, options)
    say(f"prefill of {PREFILL_TOKENS} tokens, cold, {prefill['slots_per_layer']} slots per layer:")
    say(f"  experts needed {prefill['experts_needed_by_layer']}, blobs read {prefill['blobs_read_by_layer']}")
    say(f"  {prefill['ttft_ms']:.0f} ms, {prefill['read_bytes'] / prefill['ttft_ms'] / 1e6:.2f} GB/s")
    rows = [asdict(setting) for setting in settings]
    conclude("decode", {"bundle": str(path), "options": asdict(options), "settings": rows, "prefill": prefill})


def _print_setting(s: Setting, experts: int) -> None:
    p = s.parts
    say(f"{s.slots_per_layer} of {experts} slots per layer, hit rate {s.hit_rate:.2f}")
    say(
        f"  parts:  head {p.head_s * 1e3:.2f}, block {p.block_s * 1e3:.2f}, shared {p.shared_s * 1e3:.2f}, "
        f"expert {p.expert_s * 1e3:.2f} ms; raw read {s.raw_bytes_per_s / GB:.2f} GB/s"
    )
    say(f"  floor:  {s.floor_s * 1e3:.1f} ms by the schedule, {s.memory_floor_s * 1e3:.1f} ms by memory bandwidth")
    plain = f"{s.tpot_s * 1e3:.1f} ms = {s.over_floor:.2f} x"
    if s.prefetch_tpot_s is not None and s.prefetched_share is not None and s.wasted_share is not None:
        say(f"  TPOT:   {s.prefetch_tpot_s * 1e3:.1f} ms = {s.prefetch_over_floor:.2f} x the schedule floor (aim 1.2);")
        say(f"          {s.prefetched_share:.0%} of the misses guessed, {s.wasted_share:.0%} of the bytes in vain")
        say(f"          {plain} without guesses")
    else:
        say(f"  TPOT:   {plain} the schedule floor (aim 1.2)")
    if s.slots_per_layer == experts:
        say(f"          {s.over_memory_floor:.2f} x active bytes / memory bandwidth (aim 1.3)")
    if s.alone_share is not None:
        say(f"  reads:  {s.alone_share:.0%} of the best raw rate by themselves (aim 90 %)")
    if s.read_bytes_per_s is not None and s.read_share is not None:
        say(f"          {s.read_share:.0%} while tokens are decoded, {s.read_bytes_per_s / GB:.2f} GB/s")
    if s.prefetch_read_share is not None:
        say(f"          {s.prefetch_read_share:.0%} with guesses")


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
    parser.add_argument("--prefetch", type=int, default=DecodeOptions.prefetch, help="guesses, 0: without them")
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
