"""A profiling run: a workload through an engine under a protocol, with telemetry beside it, written down as it goes.

prepare -> warm up -> for every request: empty the caches if cold, generate, write -> summary
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from profiles.protocol import Protocol
from profiles.rundir import Request, RunWriter, load_run
from profiles.summary import summarize
from profiles.telemetry.files import clock_limits
from profiles.telemetry.source import Sample, Source
from profiles.telemetry.sources import INTERVAL_S, start_source
from profiles.workloads import Prompt, Workload
from runtime.decoder import prefill_chunk
from runtime.engine import Engine, GenerateOptions, Token
from runtime.errors import EdgeError, UsageError
from runtime.machine import describe
from runtime.records import Summary

_LAST_SAMPLE_S = 1.0  # how long the end of a run waits for the sample that closes its last window
_SETTLED_C, _SETTLE_S = 1.0, 10.0  # settled: the hottest zone moved by less than this in so many seconds

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ProfileOptions:
    """What is run. `settle_s` is the most that the start waits for a steady temperature; 0 does not wait."""

    workload: Workload
    protocol: Protocol
    telemetry: str = "auto"
    chat: bool = False
    settle_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The summary, and whether every request was run."""

    summary: dict[str, Any]
    complete: bool


def profile(
    engine: Engine,
    options: ProfileOptions,
    out: Path,
    progress: Progress = lambda done, total: None,
    note: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run and write everything into the new folder `out`. `stop` is asked after every token; KeyboardInterrupt ends a
    run as cleanly.

    Raises UsageError for a folder that exists or prompts that do not fit, TelemetryError when a named source does not
    work, and what the engine raises; what was measured until then stays in the folder.
    """
    prompts = _encode(engine, options, note)
    writer = RunWriter(out)
    samples = _Samples(writer)
    try:
        source, reason = start_source(options.telemetry, samples.add)
    except BaseException:
        writer.discard()
        raise
    note(reason)
    try:
        try:
            complete = _Runner(engine, options, prompts, writer, samples, progress, stop).run(source, reason)
        finally:
            problems = _close(source, samples)
    finally:
        writer.close()
    for problem in problems:
        note(problem)
    run = load_run(out)
    summary = {"complete": complete, "telemetry_problems": problems, **summarize(run)}
    writer.summary(summary)
    return Outcome(summary, complete)


class _Samples:
    """Passes samples on, and keeps the last one. What cannot be written ends the telemetry, not the run."""

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer
        self.last: Sample | None = None
        self.problems: list[str] = []

    def add(self, sample: Sample) -> None:
        self.last = sample
        if self.problems:
            return
        try:
            self._writer.sample(sample)
        except EdgeError as error:
            self.problems.append(str(error))

    def hottest_c(self) -> float | None:
        zones = self.last.reading.temperatures_c.values() if self.last else ()
        return max((value for value in zones if value is not None), default=None)


class _Runner:
    """The loop over warm-up, repeats and prompts."""

    def __init__(
        self, engine: Engine, options: ProfileOptions, prompts: list[tuple[Prompt, list[int]]], writer: RunWriter,
        samples: _Samples, progress: Progress, stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._engine, self._options, self._prompts = engine, options, prompts
        self._writer, self._samples, self._progress, self._stop = writer, samples, progress, stop
        protocol = options.protocol
        self._generate = GenerateOptions(max_new_tokens=protocol.new_tokens, ignore_eos=protocol.ignore_eos)
        self._cold = protocol.cache == "cold"
        self.total = len(prompts) * protocol.repeats
        self._header = self._facts()

    def run(self, source: Source | None, reason: str) -> bool:
        """True when every request was run."""
        self._progress(0, self.total)
        self._header |= {"telemetry": {"source": source.name if source else None, "choice": reason}}
        self._writer.header(self._header)
        try:
            self._header["settled"] = settle(self._samples.hottest_c, self._options.settle_s, self._stop)
            self._warm_up()
            return all(self._request(*item) for item in self._order())
        except KeyboardInterrupt:
            return False

    def _order(self) -> Iterator[tuple[int, int, Prompt, list[int]]]:
        """Requests in order: all prompts, then all of them again."""
        count = len(self._prompts)
        for index in range(self.total):
            yield index, index // count, *self._prompts[index % count]

    def _warm_up(self) -> None:
        """Answers that nobody counts: code and pages are touched, clocks rise, and a warm cache is filled."""
        for number in range(self._options.protocol.warm_up):
            _, ids = self._prompts[-1 - number % len(self._prompts)]
            for _ in self._engine.generate(ids, self._generate):
                if self._stop():
                    raise KeyboardInterrupt

    def _request(self, index: int, repeat: int, prompt: Prompt, ids: list[int]) -> bool:
        """One request; False when the run is to end."""
        if self._cold:
            empty_caches(self._engine)
        request = Request(index, prompt.id, len(ids), repeat, time.monotonic_ns())
        self._writer.begin(request)
        tokens = self._engine.generate(ids, self._generate)
        try:
            for token in tokens:
                self._check_cold(token, len(ids))
                self._writer.token(index, token.record)
                if self._stop():
                    break
        finally:
            tokens.close()
            summary = self._engine.summary()
            self._writer.end(index, summary.finish_reason, summary.text)
        if index == 0:
            self._writer.header({**self._header, "engine": _settings(self._engine)})
        self._progress(index + 1, self.total)
        return not self._stop()

    def _check_cold(self, token: Token, prompt_tokens: int) -> None:
        """A cold request that finds an expert is a lie; later chunks of a long prompt may find those of the first."""
        if self._cold and token.record.index == 0 and prompt_tokens <= prefill_chunk(self._engine.config):
            found = sum(token.record.hits)
            if found:
                raise EdgeError(f"the cache was to be cold, but the prefill found {found} experts in it")

    def _facts(self) -> dict[str, Any]:
        options, workload = self._options, self._options.workload
        return {
            "bundle": str(self._engine.bundle.path),
            "workload": {
                "name": workload.name,
                "source": workload.source,
                "licence": workload.licence,
                "sha256": workload.sha256,
                "prompts": [prompt.id for prompt, _ in self._prompts],
                "chat": options.chat,
            },
            "protocol": asdict(options.protocol),
            "requests": self.total,
            "shape": _shape(self._engine),
            "generate": asdict(self._generate),
            "telemetry_interval_s": INTERVAL_S,
            "start_ns": time.monotonic_ns(),
            "start_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": describe(),
            "clock_limits": clock_limits(),
        }


def empty_caches(engine: Engine) -> None:
    """No expert in memory: neither in our slots nor in the page cache."""
    engine.empty_cache()
    for name in engine.bundle.blobs().values():
        descriptor = os.open(engine.bundle.path / name, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def settle(hottest_c: Callable[[], float | None], most_s: float, stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Wait until the hottest zone is steady, `most_s` at the most. None when nothing was waited for."""
    if not most_s:
        return None
    begin = time.monotonic()
    history: list[tuple[float, float]] = []
    while (now := time.monotonic()) - begin < most_s and not stop():
        value = hottest_c()
        if value is None:
            raise UsageError("--settle needs a telemetry source with temperatures: leave it out")
        history.append((now, value))
        recent = [c for at, c in history if at >= now - _SETTLE_S]
        if now - begin >= _SETTLE_S and max(recent) - min(recent) < _SETTLED_C:
            return {"steady": True, "seconds": round(now - begin, 1), "hottest_c": value}
        time.sleep(0.5)
    return {"steady": False, "seconds": round(time.monotonic() - begin, 1), "hottest_c": hottest_c()}


def _encode(engine: Engine, options: ProfileOptions, note: Callable[[str], None]) -> list[tuple[Prompt, list[int]]]:
    """The prompts that are run, as token ids; those that do not fit into the context are left out."""
    if engine.tokenizer is None:
        raise UsageError(f"{engine.bundle.path} has no tokenizer: a workload is made of texts")
    protocol, left_out = options.protocol, 0
    found: list[tuple[Prompt, list[int]]] = []
    for prompt in options.workload.prompts:
        if len(found) == protocol.prompts:
            break
        if options.chat:
            ids = engine.tokenizer.apply_chat([{"role": "user", "content": prompt.text}])
        else:
            ids = engine.encode(prompt.text)
        if len(ids) + protocol.new_tokens > engine.context:
            left_out += 1
            continue
        found.append((prompt, ids))
    if left_out:
        note(f"{left_out} prompts are longer than the context of {engine.context} allows and were left out")
    if not found:
        raise UsageError(f"no prompt of {options.workload.name} fits into a context of {engine.context}: use --context")
    if len(found) < protocol.prompts:
        note(f"{options.workload.name} has {len(found)} prompts that can be run, not {protocol.prompts}")
    return found


def _shape(engine: Engine) -> dict[str, Any]:
    """What the expert ids of the token lines count."""
    config = engine.config
    return {
        "moe_layers": list(config.moe_layers),
        "experts": config.router.num_experts,
        "top_k": config.router.top_k,
        "blob_bytes": engine.slot_bytes,
    }


def _settings(engine: Engine) -> dict[str, Any]:
    """How the engine was opened, as it resolved it: its report without the figures of the last answer."""
    figures = {field.name for field in fields(Summary)}
    return {name: value for name, value in engine.report().items() if name not in figures}


def _close(source: Source | None, samples: _Samples) -> list[str]:
    """End the source once it has told of the time after the last token; what went wrong with it."""
    if source is None:
        return []
    end_ns, limit = time.monotonic_ns(), time.monotonic() + _LAST_SAMPLE_S
    while time.monotonic() < limit and (samples.last is None or samples.last.time_ns < end_ns):
        time.sleep(0.01)
    source.close()
    return [*source.problems, *samples.problems]


__all__ = ["Outcome", "ProfileOptions", "profile"]
