"""Routing traces for tests: random ones, and ones written down expert by expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from remoe.trace import Block, Origin, Trace, TraceInfo
from runtime.config import RouterConfig


def make_info(layers: int, experts: int, top_k: int, **changes: Any) -> TraceInfo:
    """Facts of a trace of a model with this shape."""
    facts: dict[str, Any] = {
        "kind": "generated",
        "model": "test",
        "gates_sha256": "a" * 64,
        "router": Origin("base", "b" * 64),
        "source": Origin("texts", "c" * 64),
        "moe_layers": tuple(range(1, layers + 1)),
        "num_experts": experts,
        "top_k": top_k,
        "hidden_size": 4,
        "expert_bytes": 4096,
        "prefill_chunk": 512,
        "rules": RouterConfig(experts, top_k),
    }
    return TraceInfo(**{**facts, **changes})


def random_trace(
    lengths: Sequence[tuple[int, int]], layers: int = 2, experts: int = 8, top_k: int = 2, seed: int = 0, **changes: Any
) -> Trace:
    """One request per (prompt tokens, decode steps), logits included; routing leans towards the low ids."""
    rng = np.random.default_rng(seed)
    blocks = []
    for request, (prompt, decode) in enumerate(lengths):
        n = prompt + decode
        logits = (rng.normal(size=(n, layers, experts)) - 0.1 * np.arange(experts)).astype(np.float16)
        chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
        weights = np.take_along_axis(logits, chosen, -1)
        decode_flags = np.arange(n) >= prompt
        blocks.append(
            Block(chosen, weights, rng.integers(0, 50, n), np.full(n, request), np.arange(n), decode_flags, logits)
        )
    return Trace.from_blocks(make_info(layers, experts, top_k, **changes), blocks)


def written_trace(
    rows: Sequence[Sequence[Sequence[int]]], experts: int, requests: Sequence[int] | None = None
) -> Trace:
    """A teacher-forced trace of rows[token][layer] = experts, the best first; of the others all logits are equal."""
    chosen = np.array(rows)
    n, layers, top_k = chosen.shape
    logits = np.zeros((n, layers, experts))
    np.put_along_axis(logits, chosen, np.arange(top_k, 0, -1.0), axis=-1)
    of = np.zeros(n, int) if requests is None else np.array(requests)
    positions = np.arange(n) - np.array([int(np.flatnonzero(of == r)[0]) for r in of])
    block = Block(chosen, np.full(chosen.shape, 0.5), np.arange(n), of, positions, np.ones(n), logits)
    return Trace.from_blocks(make_info(layers, experts, top_k, kind="teacher-forced"), [block])
