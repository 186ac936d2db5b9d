"""Gate logits to experts and weights with a gradient, the steps of runtime/router.py.

L layers, N tokens one after another, E experts, K of them chosen per token. Sets of experts are masks [..., N, E].
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime import router
from runtime.config import RouterConfig


def choose(config: RouterConfig, logits: Tensor, bias: Tensor | None) -> Tensor:
    """logits [..., E] to the chosen experts [..., K] int64, best first. No gradient."""
    with torch.no_grad():
        return router.choose(config, logits, bias)[0]


def weigh(config: RouterConfig, logits: Tensor, experts: Tensor) -> Tensor:
    """Weights [..., K] of `experts` [..., K], whoever chose them: the family's own rule on the gate's own logits."""
    scores = logits.softmax(-1) if config.scoring == "softmax" else logits.sigmoid()
    return router.weigh(config, scores, experts)


def log_distribution(config: RouterConfig, logits: Tensor, sharpen: float = 1.0) -> Tensor:
    """log P over all experts [..., E], the P of the ReMoE terms.

    softmax(sharpen * logits); for sigmoid gates the scores divided by their sum. A `sharpen` above 1 makes flat gates,
    as up-cycled models have them, feel the terms at the top-k boundary; 1 is the published form.
    """
    if config.scoring == "softmax":
        return (sharpen * logits).log_softmax(-1)
    log_scores = sharpen * torch.nn.functional.logsigmoid(logits)
    return log_scores - log_scores.logsumexp(-1, keepdim=True)


def order_values(config: RouterConfig, logits: Tensor, bias: Tensor | None) -> Tensor:
    """What the top-k sorts by, with a gradient: logits, or for gates with sigmoid scores those plus the bias."""
    if config.scoring == "softmax" and bias is None:
        return logits
    scores = logits.softmax(-1) if config.scoring == "softmax" else logits.sigmoid()
    return scores if bias is None else scores + bias


def as_mask(experts: Tensor, num_experts: int) -> Tensor:
    """Expert ids [..., K] as a set: bool [..., E]."""
    mask = torch.zeros(*experts.shape[:-1], num_experts, dtype=torch.bool, device=experts.device)
    return mask.scatter_(-1, experts, True)


def same_document(segments: Tensor, distance: int) -> Tensor:
    """bool [N]: token t and token t - distance both exist and belong to one document (`segments` [N], an id each)."""
    same = torch.zeros(len(segments), dtype=torch.bool, device=segments.device)
    if distance < len(segments):
        same[distance:] = segments[distance:] == segments[:-distance]
    return same


def expert_overlap(chosen: Tensor, segments: Tensor) -> Tensor:
    """EOR per layer, [...]: mean over steps of |E_t n E_{t-1}| / K, within documents; nan without such a step.

    `chosen` is the mask [..., N, E].
    """
    valid = same_document(segments, 1)[1:]
    shared = (chosen[..., 1:, :] & chosen[..., :-1, :]).sum(-1).double()
    return shared[..., valid].mean(-1) / chosen[..., 0, :].sum(-1)
