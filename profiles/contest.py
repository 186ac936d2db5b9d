"""Rivals in one run: each request is answered under every one of them in turn, and the machine is measured in between.

for each request: ceilings -> for each rival: route its way, prepare the cache, answer

Speeds of a machine drift; within one request they hardly do, so rivals are compared request by request.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from profiles.compare import Reduction, compare
from profiles.floor import Disk, PartCosts, Parts, token_floor
from profiles.raw_reads import MEMORY_BYTES, RawReader
from profiles.rivals import Job, Rival
from profiles.run import empty_caches
from profiles.rundir import Request, Run
from profiles.summary import summarize
from runtime.engine import Engine, GenerateOptions
from runtime.errors import UsageError
from runtime.records import TokenRecord

_RAW_SETTINGS = tuple((block << 20, threads) for block in (1, 4) for threads in (4, 8))  # bytes at once, threads
_RAW_BYTES = 64 << 20
_RAW_FILES = 256  # blobs that are kept open for it
_PART_ROUNDS = 3


@dataclass(frozen=True)
class Conditions:
    """`cold`: the expert cache is empty when a request begins. Otherwise it holds what the request before, answered
    the same way, has left there: that one is answered again, uncounted. `temperature` 0 is greedy.
    """

    cold: bool = True
    temperature: float = 0.0


@dataclass(frozen=True)
class Ceiling:
    """Of the machine, just before a request was answered; `raw_bytes_per_s` None where the disk cannot be read raw."""

    costs: PartCosts
    raw_bytes_per_s: float | None

    def floor_ms(self, blob_bytes: int, record: TokenRecord) -> float | None:
        """The schedule floor of a token."""
        if self.raw_bytes_per_s is None:
            return None
        return 1000 * token_floor(self.costs, Disk(blob_bytes, self.raw_bytes_per_s), record)


@dataclass(frozen=True)
class Answer:
    """A request as one rival answered it. Of the `pairs` experts of its decode steps but the first, `same` were used by
    the step before. `agreement` as in Summary.route_agreement.
    """

    request: Request
    same: int
    pairs: int
    agreement: float | None


@dataclass
class Outcome:
    """Whole rounds only: every rival has answered the same requests, one per ceiling."""

    ceilings: list[Ceiling] = field(default_factory=list)
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    complete: bool = False


class Ceilings:
    """Measures what the machine can do now, with the engine's own back-end and blobs. Use as a context manager."""

    def __init__(self, engine: Engine, note: Callable[[str], None]) -> None:
        self._parts = Parts(engine.backend, engine.config, engine.slot_tensors)
        blobs = sorted(engine.bundle.path / name for name in engine.bundle.blobs().values())
        sample = blobs[:: -(-len(blobs) // _RAW_FILES)]
        self._bytes = min(_RAW_BYTES, 4 * len(sample) * engine.slot_bytes)
        self._reader: RawReader | None = None
        try:
            self._reader = RawReader.open(sample, min(MEMORY_BYTES, engine.expert_budget_bytes))
        except UsageError as error:
            note(f"no ceiling of the disk: {error}")

    def __enter__(self) -> Ceilings:
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.close()

    def measure(self) -> Ceiling:
        """The best raw rate of a few settings, and the parts of a token."""
        raw = None
        if self._reader is not None:
            raw = max(self._reader.rate(block, threads, self._bytes) for block, threads in _RAW_SETTINGS)
        return Ceiling(self._parts.measure(_PART_ROUNDS), raw)


def contest(
    engine: Engine, rivals: Sequence[Rival], jobs: Sequence[Job], conditions: Conditions,
    emit: Callable[[dict[str, Any]], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    note: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:  # fmt: skip
    """Answer every job under every rival. `emit` gets one object per ceiling, request and token as they are measured;
    `stop` is asked after every token.

    Each rival first answers the last job uncounted, so that code and clocks are warm and a router or recording that
    cannot be used is refused before anything is measured. Raises what the engine raises.
    """
    outcome = Outcome(answers={rival.name: [] for rival in rivals})
    total, done = len(rivals) * (len(jobs) + 1), 0
    course = _Course(engine, jobs, conditions, stop)
    try:
        with Ceilings(engine, note) as ceilings:
            for rival in rivals:
                course.prepare(rival, len(jobs) - 1)
                list(course.tokens(rival, len(jobs) - 1))
                progress(done := done + 1, total)
            for number in range(len(jobs)):
                ceiling = ceilings.measure()
                emit({"type": "ceiling", "request": number, **asdict(ceiling)})
                found = {}
                for rival in rivals:
                    found[rival.name] = course.answer(rival, number, emit)
                    progress(done := done + 1, total)
                outcome.ceilings.append(ceiling)
                for name, answer in found.items():
                    outcome.answers[name].append(answer)
        outcome.complete = True
    except KeyboardInterrupt:
        pass  # whole rounds are reported, and `complete` tells
    return outcome


class _Course:
    """Answers one job under one rival."""

    def __init__(self, engine: Engine, jobs: Sequence[Job], conditions: Conditions, stop: Callable[[], bool]) -> None:
        self._engine, self._jobs, self._conditions, self._stop = engine, jobs, conditions, stop

    def prepare(self, rival: Rival, number: int) -> None:
        """The cache as the conditions want it when job `number` begins."""
        empty_caches(self._engine)
        if not self._conditions.cold:
            for _ in self.tokens(rival, (number - 1) % len(self._jobs)):
                pass

    def answer(self, rival: Rival, number: int, emit: Callable[[dict[str, Any]], None]) -> Answer:
        """Raises KeyboardInterrupt when it is to stop."""
        self.prepare(rival, number)
        name, job = rival.name, self._jobs[number]
        emit({"type": "request", "setting": name, "request": number, "prompt_tokens": len(job.prompt)})
        records = []
        for record in self.tokens(rival, number):
            emit({**record.to_json(), "setting": name, "request": number})
            records.append(record)
        same, pairs = _overlap(records[1:])
        kept = [replace(record, experts=[], missed=[]) for record in records]  # they would fill the memory
        request = Request(number, str(job.request), len(job.prompt), 0, records[0].time_ns, kept, "length")
        return Answer(request, same, pairs, self._engine.summary().route_agreement)

    def tokens(self, rival: Rival, number: int) -> Iterator[TokenRecord]:
        """Records of the answer to a job."""
        job = self._jobs[number]
        rival.take_over(self._engine, number)
        options = GenerateOptions(job.new_tokens, self._conditions.temperature, seed=number, ignore_eos=True)
        answer = self._engine.generate(job.prompt, options)
        try:
            for token in answer:
                yield token.record
                if self._stop():
                    raise KeyboardInterrupt
        finally:
            answer.close()


def figures(outcome: Outcome, blob_bytes: int) -> dict[str, dict[str, Any]]:
    """By rival; all are over decode steps, and None where nothing was measured."""
    return {name: _figures(answers, outcome.ceilings, blob_bytes) for name, answers in outcome.answers.items()}


def reductions(outcome: Outcome) -> dict[str, dict[str, Reduction]]:
    """By how much TPOT (mean), misses and bytes of every rival are below those of the first."""
    runs = {name: _run(answers) for name, answers in outcome.answers.items()}
    first, *others = runs.values()
    found = {name: compare(first, run) for name, run in zip([*runs][1:], others, strict=True)}
    return {name: {of: result[of] for of in ("tpot_ms", "misses", "bytes")} for name, result in found.items()}


def ceiling_figures(outcome: Outcome) -> dict[str, Any]:
    """Medians over the requests."""
    costs = [ceiling.costs for ceiling in outcome.ceilings]
    rates = [ceiling.raw_bytes_per_s for ceiling in outcome.ceilings if ceiling.raw_bytes_per_s is not None]
    parts = {name: _median([getattr(cost, name) for cost in costs]) for name in PartCosts.__dataclass_fields__}
    return {"raw_read_bytes_per_s": _median(rates), **parts}


def _figures(answers: Sequence[Answer], ceilings: Sequence[Ceiling], blob_bytes: int) -> dict[str, Any]:
    summary = summarize(_run(answers))
    for name in ("requests_wanted", "energy", "telemetry"):  # belong to a run with a workload and sensors
        del summary[name]
    decode = [record for answer in answers for record in answer.request.decode]
    total_ms, busy_ms = (sum(getattr(r, name) for r in decode) for name in ("total_ms", "read_busy_ms"))
    pairs = sum(answer.pairs for answer in answers)
    return {
        **summary,
        "overlap": sum(answer.same for answer in answers) / pairs if pairs else None,
        "waiting_share": sum(r.wait_ms for r in decode) / total_ms if total_ms else None,
        "reading_share": busy_ms / total_ms if total_ms else None,
        "read_bytes_per_s": sum(r.bytes for r in decode) / busy_ms * 1000 if busy_ms else None,
        "route_agreement": _mean([a.agreement for a in answers if a.agreement is not None]),
        **_against_ceilings(answers, ceilings, blob_bytes),
    }


def _against_ceilings(answers: Sequence[Answer], ceilings: Sequence[Ceiling], blob_bytes: int) -> dict[str, Any]:
    """Shares are taken within a request, then the median over requests: the machine's speed drifts between them."""
    floors, over, shares = [], [], []
    for answer, ceiling in zip(answers, ceilings, strict=True):
        decode, raw = answer.request.decode, ceiling.raw_bytes_per_s
        found = [floor for record in decode if (floor := ceiling.floor_ms(blob_bytes, record)) is not None]
        if found:
            floors.append(statistics.median(found))
            over.append(statistics.median(r.total_ms for r in decode) / floors[-1])
        busy_s = sum(r.read_busy_ms for r in decode) / 1000
        if raw is not None and busy_s:
            shares.append(sum(r.bytes for r in decode) / busy_s / raw)
    return {"floor_ms": _median(floors), "over_floor": _median(over), "read_share_of_raw": _median(shares)}


def _overlap(decode: Sequence[TokenRecord]) -> tuple[int, int]:
    """Experts that the step before used as well, and all but those of the first step, over layers."""
    same = pairs = 0
    for before, now in itertools.pairwise(decode):
        for old, new in zip(before.experts, now.experts, strict=True):
            same += len(set(old) & set(new))
            pairs += len(new)
    return same, pairs


def _run(answers: Sequence[Answer]) -> Run:
    """As the figures of profiling runs want it: equal requests, no telemetry."""
    return Run(Path(), {"workload": {"sha256": ""}}, [answer.request for answer in answers], [], None)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
