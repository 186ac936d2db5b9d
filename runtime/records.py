"""One record per token, and the summary of a run. docs/records.md describes the file field by field."""

from __future__ import annotations

import json
import math
import resource
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from runtime.cache import CacheStats
from runtime.decoder import Timing
from runtime.errors import EdgeError, UsageError

FinishReason = Literal["length", "eos", "stop", "interrupted", "error"]


@dataclass(frozen=True)
class TokenRecord:
    """One output token. The five parts add up to `total_ms`, which is TPOT, or TTFT for the first token."""

    index: int
    token_id: int
    time_ns: int  # CLOCK_MONOTONIC when the token was ready
    total_ms: float
    dense_ms: float
    routing_ms: float
    wait_ms: float
    expert_ms: float
    other_ms: float
    hits: list[int]
    misses: list[int]
    bytes: int
    read_ms: float
    queue_ms: float
    read_busy_ms: float
    evictions: int
    minor_faults: int
    major_faults: int
    experts: list[list[int]] = field(default_factory=list)  # per layer; empty in records of older releases
    missed: list[list[int]] = field(default_factory=list)
    prefetched: int = 0  # misses whose read began on a guess
    wasted_bytes: int = 0  # of `bytes`: for guesses that were wrong

    def to_json(self) -> dict[str, Any]:
        """The line of this token, not copied: writing it must cost next to nothing."""
        return {"type": "prefill" if self.index == 0 else "token", **vars(self)}


class Meter:
    """Turns what decoder, cache and loader have counted since the last token into a TokenRecord."""

    def __init__(self, busy_ns: int) -> None:
        """`busy_ns`: the loader's busy time so far."""
        self._faults = _faults()
        self._busy_ns = busy_ns

    def record(
        self, index: int, token_id: int, total_ns: int, timing: Timing, stats: CacheStats, busy_ns: int
    ) -> TokenRecord:
        """`total_ns` is the whole time of the token; `busy_ns` the loader's busy time so far."""
        minor, major = _faults()
        before, self._faults = self._faults, (minor, major)
        busy, self._busy_ns = busy_ns - self._busy_ns, busy_ns
        compute = timing.expert - stats.wait_ns
        other = total_ns - timing.dense - timing.routing - timing.expert
        return TokenRecord(
            index=index,
            token_id=token_id,
            time_ns=time.monotonic_ns(),
            total_ms=_ms(total_ns),
            dense_ms=_ms(timing.dense),
            routing_ms=_ms(timing.routing),
            wait_ms=_ms(stats.wait_ns),
            expert_ms=_ms(compute),
            other_ms=_ms(other),
            hits=stats.hits,
            misses=stats.misses,
            bytes=stats.bytes,
            read_ms=_ms(stats.read_ns),
            queue_ms=_ms(stats.queue_ns),
            read_busy_ms=_ms(busy),
            evictions=stats.evictions,
            minor_faults=minor - before[0],
            major_faults=major - before[1],
            experts=stats.experts,
            missed=stats.missed,
            prefetched=stats.prefetched,
            wasted_bytes=stats.wasted_bytes,
        )


@dataclass
class Summary:
    """A run in figures; None where nothing was measured. Rates and hit rate are over decode, without prefill."""

    prompt_tokens: int
    reused_tokens: int = 0  # of the prompt, whose KV rows were there already
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "length"
    ttft_ms: float | None = None
    tpot_ms: dict[str, float | None] = field(default_factory=dict)
    tokens_per_s: float | None = None
    hit_rate: float | None = None
    expert_bytes_per_token: float | None = None
    prefetched_share: float | None = None  # of the misses: their reads began on a guess
    route_agreement: float | None = None  # with cache-prior routing: share of experts that stock routing chooses, too
    read_bytes_per_s: float | None = None
    prefill_bytes: int = 0
    peak_rss_bytes: int = 0
    mapped_code_bytes: int = 0
    retries: int = 0

    def work_out(self, records: list[TokenRecord]) -> None:
        """Every figure from the records of a run so far, the first of which is the prefill's."""
        self.ttft_ms = records[0].total_ms if records else None
        self.prefill_bytes = records[0].bytes if records else 0
        decode = records[1:]
        times = sorted(r.total_ms for r in decode)
        self.tpot_ms = {"median": None, "p95": None, "mean": None}
        if times:
            mean = statistics.fmean(times)
            self.tpot_ms = {"median": statistics.median(times), "p95": percentile(times, 95), "mean": mean}
            self.tokens_per_s = 1000 / mean
            hits, misses = (sum(sum(getattr(r, name)) for r in decode) for name in ("hits", "misses"))
            self.hit_rate = hits / (hits + misses)
            self.prefetched_share = sum(r.prefetched for r in decode) / misses if misses else None
            self.expert_bytes_per_token = sum(r.bytes for r in decode) / len(decode)
        busy_ms = sum(r.read_busy_ms for r in records)
        if busy_ms:
            self.read_bytes_per_s = sum(r.bytes for r in records) / busy_ms * 1000
        self.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.mapped_code_bytes = psutil.Process().memory_info().shared


class Recorder:
    """Writes the JSONL file of a run: a header, one line per token, an end line. Without a path it writes nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file: IO[str] | None = None
        self._path = path
        if path is not None:
            try:
                self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed by close()
            except OSError as error:
                raise UsageError(f"--record {path}: {error.strerror}") from None

    def header(self, facts: dict[str, Any]) -> None:
        self._write({"type": "run", "format": 1, **facts})

    def token(self, record: TokenRecord) -> None:
        if self._file is not None:
            self._write(record.to_json())

    def end(self, summary: dict[str, Any]) -> None:
        """The last line of a run; a file without it was cut off."""
        self._write({"type": "end", **summary})
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                raise self._cut_off(error) from None

    def close(self) -> None:
        """What a run that has not ended would still write is dropped. Safe to call twice."""
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                raise self._cut_off(error) from None

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            text = json.dumps(line, separators=(",", ":")) + "\n"
            try:
                self._file.write(text)
            except OSError as error:
                raise self._cut_off(error) from None

    def _cut_off(self, error: OSError) -> EdgeError:
        return EdgeError(f"--record {self._path}: {error.strerror}: the record ends before the run")


def percentile(ordered: list[float], percent: float) -> float:
    """Nearest-rank percentile of sorted values."""
    return ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1]


def _ms(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 4)


def _faults() -> tuple[int, int]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_majflt
