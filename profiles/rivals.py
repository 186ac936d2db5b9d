"""What `edge bench` sets against each other: ways of routing one bundle, and the requests that all of them answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from profiles.random_model import random_ids
from remoe.synthetic import SyntheticRouting, synthetic_trace
from remoe.trace import Trace
from runtime.cache_prior import CachePrior
from runtime.config import ModelConfig
from runtime.engine import Engine, EngineOptions
from runtime.errors import UsageError
from runtime.replay import Steps

RANDOM_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Job:
    """One request. `request` is its place in recordings, where it comes from one."""

    prompt: tuple[int, ...]
    new_tokens: int
    request: int = 0


@dataclass(frozen=True)
class Rival:
    """A way of routing: a router, with a prior or without, or `steps`, one recording per job in the router's place;
    and the policy of the cache.
    """

    name: str
    router: str = "base"
    prior: CachePrior | None = None
    steps: tuple[Steps, ...] | None = None
    policy: str = EngineOptions.policy
    facts: Mapping[str, Any] = field(default_factory=dict)

    def take_over(self, engine: Engine, number: int) -> None:
        """Route the engine's next sequence, which answers job `number`. Raises UsageError or BundleError.

        The cache keeps what it holds, unless it was under another policy.
        """
        if engine.options.policy != self.policy:
            engine.use_policy(self.policy)
        if self.steps is None:
            engine.use_router(self.router, self.prior)
        else:
            engine.replay(self.steps[number])


def recorded_jobs(
    traces: Mapping[str, Trace], count: int, new_tokens: int, config: ModelConfig, context: int,
    note: Callable[[str], None],
) -> list[Job]:  # fmt: skip
    """The first `count` requests that all traces have: prompt and steps as recorded, at most `new_tokens` written.

    A request without a prompt begins with its first step. Raises UsageError when prompts are not equally long, or
    nothing can be run.
    """
    requests = {name: trace.request_rows() for name, trace in traces.items()}
    available = min(map(len, requests.values()))
    if available < count:
        note(f"the recordings have {available} requests in common, not {count}")
    jobs, left_out = [], 0
    for number in range(min(count, available)):
        prompt, rows = _common_prompt(traces, {name: found[number] for name, found in requests.items()}, number)
        new = min(new_tokens, rows - prompt + 1)
        if new < 2 or prompt + new > context:
            left_out += 1
            continue
        first_name, first = next(iter(traces.items()))
        start = requests[first_name][number].start
        tokens = _prompt_ids(first.tokens[start : start + prompt], config.vocab_size, number)
        jobs.append(Job(tokens, new, number))
    if left_out:
        note(f"{left_out} recorded requests have no decode step, or do not fit a context of {context}: left out")
    if not jobs:
        raise UsageError("no recorded request can be run: use --context, or record answers with `edge trace`")
    return jobs


def random_jobs(count: int, new_tokens: int, config: ModelConfig) -> list[Job]:
    """Short prompts of random tokens, for a bundle that has no tokenizer."""
    return [
        Job(tuple(random_ids(config.vocab_size, RANDOM_PROMPT_TOKENS, seed)), new_tokens, seed) for seed in range(count)
    ]


def recorded_rival(name: str, trace: Trace, jobs: Sequence[Job], config: ModelConfig) -> Rival:
    """A trace in the router's place. Raises UsageError, naming it, when it is of a model of another shape."""
    rows, info = trace.request_rows(), trace.info
    facts = {"model": info.model, "router": info.router.name, "routing": info.routing, "source": info.source.name}
    return _replay(name, trace, [rows[job.request] for job in jobs], config, facts)


def synthetic_rival(overlap: float, jobs: Sequence[Job], config: ModelConfig, blob_bytes: int) -> Rival:
    """Routing made up with this overlap, for these jobs. Raises UsageError for one that cannot be."""
    lengths = tuple((len(job.prompt), job.new_tokens - 1) for job in jobs)
    trace = synthetic_trace(config, SyntheticRouting(overlap, lengths), blob_bytes)
    facts = {"model": trace.info.model, "wanted_overlap": overlap}
    return _replay(f"overlap {overlap:g}", trace, trace.request_rows(), config, facts)


def _replay(name: str, trace: Trace, rows: Sequence[range], config: ModelConfig, facts: Mapping[str, Any]) -> Rival:
    info = trace.info
    steps = tuple(
        Steps(info.moe_layers, info.num_experts, trace.experts[r.start : r.stop], trace.weights[r.start : r.stop])
        for r in rows
    )
    for of in steps:
        try:
            of.check(config)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
    return Rival(name, steps=steps, facts=facts)


def _common_prompt(traces: Mapping[str, Trace], rows: Mapping[str, range], number: int) -> tuple[int, int]:
    """Tokens of a request's prompt, equal in all traces, and of the shortest recording of it."""
    prompts = {}
    for name, trace in traces.items():
        decode = trace.decode[rows[name].start : rows[name].stop]
        prompts[name] = max(1, int(np.count_nonzero(decode == 0)))
    first, *others = prompts
    for other in others:
        if prompts[other] != prompts[first]:
            raise UsageError(
                f"request {number}: the prompt has {prompts[first]} tokens in {first}, {prompts[other]} in {other}: "
                "replay recordings of the same prompts"
            )
    return prompts[first], min(map(len, rows.values()))


def _prompt_ids(tokens: np.ndarray[Any, Any], vocab_size: int, seed: int) -> tuple[int, ...]:
    """The recorded tokens, or random ones where the recording is of a larger vocabulary."""
    ids = tokens.tolist() if int(tokens.max()) < vocab_size else random_ids(vocab_size, len(tokens), seed)
    return tuple(ids)
