"""Traces with a wanted overlap (EOR) for a model of any shape: what routing costs, without a trained model.

Each layer of each request is a Markov chain over sets of K experts. From one token to the next a random number n of the
set stays, any n of them alike; the other K - n experts are drawn evenly from those outside. No expert is preferred, so
the load is even. n is 2K - E (as many as must stay, where E < 2K) plus a binomial number whose mean gives the wanted
overlap. Those numbers are drawn in strata: the overlap of a trace is the wanted one up to little more than rounding.

Only neighbouring tokens are alike: real routing comes back to older experts more often than this one, so a cache of
more slots than K hits less here than it would there.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from remoe.trace import Block, Origin, Trace, TraceInfo
from runtime.config import ModelConfig
from runtime.errors import UsageError
from runtime.layout import expert_bytes, padded

Array = np.ndarray[Any, np.dtype[Any]]
NO_GATES = hashlib.sha256(b"").hexdigest()  # the fingerprint of a model without gates


@dataclass(frozen=True)
class SyntheticRouting:
    """`overlap`: mean over steps and layers of |E_t n E_(t-1)| / K. `lengths`: prompt tokens and decode steps of each
    request.
    """

    overlap: float
    lengths: tuple[tuple[int, int], ...]
    seed: int = 0


def synthetic_trace(config: ModelConfig, options: SyntheticRouting, expert_file_bytes: int | None = None) -> Trace:
    """A trace of a model of this shape; equal options give equal traces. Weights are all 1 / K, tokens drawn evenly.

    `expert_file_bytes`: what reading one expert takes (default: its values in fp16, padded to pages).
    Raises UsageError for an overlap that this shape cannot have, or requests without a token.
    """
    low, chance = _staying(config, options.overlap)
    if not options.lengths or any(prompt < 0 or steps < 0 or not prompt + steps for prompt, steps in options.lengths):
        raise UsageError("a synthetic trace needs requests with at least one token each")
    rng = np.random.default_rng(options.seed)
    layers, top_k = len(config.moe_layers), config.router.top_k
    prompts, steps = np.array(options.lengths).T
    size = int((prompts + steps).max())
    times = np.arange(1, size)
    decoding = (times > prompts[:, None]) & (times < (prompts + steps)[:, None])  # both ends of [R, T-1] are decode
    staying = np.zeros((*decoding.shape, layers), np.int64)
    for layer in range(layers):
        for part in (decoding, ~decoding):
            staying[part, layer] = low + _binomials(rng, int(part.sum()), top_k - low, chance)
    experts = _chains(rng, staying, config.router.num_experts, top_k)
    return Trace.from_blocks(*_blocks(config, options, experts, rng, expert_file_bytes))


def _staying(config: ModelConfig, overlap: float) -> tuple[int, float]:
    """How many of a set must stay, and the chance of each of the others to stay. Raises UsageError."""
    experts, top_k = config.router.num_experts, config.router.top_k
    low = max(0, 2 * top_k - experts)
    if not (math.isfinite(overlap) and low <= overlap * top_k <= top_k):
        raise UsageError(
            f"an overlap of {overlap:g} cannot be: with the top {top_k} of {experts} it is {low / top_k:g} to 1"
        )
    return low, (overlap * top_k - low) / (top_k - low) if top_k > low else 1.0


def _binomials(rng: np.random.Generator, count: int, trials: int, chance: float) -> Array:
    """`count` binomial numbers, one from each of as many equal strata of the distribution, in random order."""
    weights = [math.comb(trials, n) * chance**n * (1 - chance) ** (trials - n) for n in range(trials + 1)]
    places = (rng.permutation(count) + rng.random(count)) / max(count, 1)
    return np.minimum(np.searchsorted(np.cumsum(weights), places, side="right"), trials)


def _chains(rng: np.random.Generator, staying: Array, experts: int, top_k: int) -> Array:
    """Sets [R, T, L, K] in random order, of which `staying` [R, T-1, L] go from each to the next."""
    requests, steps, layers = staying.shape
    chains = np.empty((requests, steps + 1, layers, top_k), np.int64)
    chains[:, 0] = rng.random((requests, layers, experts)).argsort(-1)[..., :top_k]
    ranks = np.arange(top_k)
    for t in range(steps):
        drawn = rng.random((requests, layers, experts))
        np.put_along_axis(drawn, chains[:, t], np.take_along_axis(drawn, chains[:, t], -1) - 1, -1)
        order = drawn.argsort(-1)  # those of the set first, shuffled, then the others, shuffled
        kept = staying[:, t, :, None]
        chosen = np.take_along_axis(order, np.where(ranks < kept, ranks, top_k + ranks - kept), -1)
        chains[:, t + 1] = rng.permuted(chosen, axis=-1)
    return chains


def _blocks(
    config: ModelConfig, options: SyntheticRouting, experts: Array, rng: np.random.Generator, file_bytes: int | None
) -> tuple[TraceInfo, list[Block], Array | None]:
    from runtime.decoder import prefill_chunk  # needs torch, which only making a trace does

    rules, layers = config.router, len(config.moe_layers)
    settings = json.dumps({**asdict(options), "rules": asdict(rules), "layers": config.moe_layers}, sort_keys=True)
    name = f"synthetic, overlap {options.overlap:g}"
    origin = Origin(name, hashlib.sha256(settings.encode()).hexdigest())
    info = TraceInfo(
        kind="generated",
        model=name,
        gates_sha256=NO_GATES,
        router=origin,
        source=origin,
        moe_layers=config.moe_layers,
        num_experts=rules.num_experts,
        top_k=rules.top_k,
        hidden_size=config.hidden_size,
        expert_bytes=file_bytes or padded(expert_bytes(config)),
        prefill_chunk=prefill_chunk(config),
        rules=rules,
        routing="synthetic",
    )
    blocks = [
        _block(number, chain[: prompt + steps], prompt, rng.integers(0, config.vocab_size, prompt + steps))
        for number, (chain, (prompt, steps)) in enumerate(zip(experts, options.lengths, strict=True))
    ]
    return info, blocks, np.zeros((layers, rules.num_experts)) if rules.choice_bias else None


def _block(request: int, experts: Array, prompt: int, tokens: Array) -> Block:
    places = np.arange(len(experts))
    weights = np.full(experts.shape, 1 / experts.shape[-1])
    return Block(experts, weights, tokens, np.full(len(experts), request), places, places >= prompt)
