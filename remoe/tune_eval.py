"""What tuned gates cost and save on text that they have not seen: teacher-forced, beside the stock gates.

Misses are those of an LRU cache per layer that is empty at the start of each document, counted over all its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from remoe.cache_model import Prior, lru_contents, misses
from remoe.gates import Gates, Tape
from remoe.head import head_losses
from remoe.routing import as_mask, expert_overlap
from remoe.texts import Sequences, batch
from remoe.tune import Teacher, last_hidden
from runtime.config import ModelConfig

Numbers = dict[str, float]


def evaluate(
    model: Any,
    config: ModelConfig,
    sequences: Sequences,
    tensors: dict[str, torch.Tensor] | None,
    slots: Sequence[int] = (),
    *,
    prior: Prior | None = None,
    teacher: Teacher | None = None,
) -> Numbers:
    """Numbers of the gates `tensors` (None: the stock ones) in a transformers model that is left as it was.

    ce (nats per token), ppl, kl (stock model || this one, nats per token), agreement (share of tokens with the same
    best word), eor, load_cv and load_entropy (of expert loads per layer, means over layers; entropy over log E), and
    `misses_C` per token over all layers for each C of `slots` (default: the router's K).
    """
    gates = Gates(model, config)
    if tensors is not None:
        gates.load(tensors)
    teacher = teacher or Teacher(keep=False)
    sizes = sorted(set(slots) or {config.router.top_k})
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    totals: dict[str, float] = {}
    loads = torch.zeros(len(config.moe_layers), config.router.num_experts, dtype=torch.float64)
    try:
        with gates.installed(), torch.no_grad():
            for row in range(len(sequences)):
                for name, value in _row(gates, sequences, row, sizes, prior, teacher, device, loads).items():
                    totals[name] = totals.get(name, 0.0) + value / len(sequences)
    finally:
        model.train(was_training)
    share = loads / loads.sum(-1, keepdim=True)
    entropy = -torch.xlogy(share, share).sum(-1) / math.log(config.router.num_experts)
    return {
        **totals,
        "ppl": math.exp(min(totals["ce"], 700.0)),
        "load_cv": float((loads.std(-1, correction=0) / loads.mean(-1)).mean()),
        "load_entropy": float(entropy.mean()),
    }


def _row(
    gates: Gates,
    sequences: Sequences,
    row: int,
    sizes: Sequence[int],
    prior: Prior | None,
    teacher: Teacher,
    device: torch.device,
    loads: torch.Tensor,
) -> Numbers:
    config = gates.config
    given = batch(sequences, [row], device)
    segments = given.segments.flatten()
    with gates.recorded(Tape(segments, prior)) as tape:
        hidden = last_hidden(gates.model, given)
    gates.forget()
    taught = teacher.hidden(gates, sequences, [row], given)
    weight = gates.model.get_output_embeddings().weight
    head = head_losses(hidden, weight, given.targets.flatten(), taught, 1.0, 1.0, config.logits_scale)
    experts = torch.stack(tape.experts)
    chosen = as_mask(experts, config.router.num_experts)
    loads += chosen.sum(-2).cpu()
    overlap = expert_overlap(chosen, segments).mean()
    numbers = {
        "ce": head.ce,
        "kl": head.kl,
        "agreement": head.agreement,
        "eor": float(overlap) if overlap.isfinite() else 0.0,
    }
    for size in sizes:
        held = lru_contents(experts, segments, config.router.num_experts, size)
        numbers[f"misses_{size}"] = float(misses(experts, held).sum(0).double().mean())
    return numbers
