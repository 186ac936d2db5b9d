"""The terms of the ReMoE objective (arXiv 2605.27081), one small function each, and further ones that it does not have.

Shapes: `p`, `log_p` [..., N, E] are distributions over the experts of one layer (or of a stack of layers), `held` and
`chosen` bool [..., N, E] are sets of experts, `segments` [N] says which document a token belongs to. Every function
returns [...]: one value per layer. A pair of steps counts only within a document; without any pair a term is 0.
Logarithms are natural.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from remoe.routing import same_document

LAGS = (1, 2, 4, 8, 16)
_EPSILON = 1e-8


def previous_sets(chosen: Tensor) -> Tensor:
    """E_{t-1} for every t: the published reuse target. The first step has none."""
    held = torch.zeros_like(chosen)
    held[..., 1:, :] = chosen[..., :-1, :]
    return held


def reuse_loss(p: Tensor, held: Tensor, segments: Tensor, top_k: int) -> Tensor:
    """L_Reuse = -log(rho + 1e-8), rho = mean_t m_t, m_t = 1/K sum of P_t over the experts of a set.

    The log is taken of the mean, and the set is hard: no gradient flows into what chose it. Published with
    `held` = `previous_sets(E)`; with the content of a cache before each step it is the reuse that this cache rewards.
    """
    valid = same_document(segments, 1)
    if not valid.any():
        return _nothing(p)
    mass = (p * held.detach()).sum(-1)[..., valid] / top_k
    return -(mass.mean(-1) + _EPSILON).log()


def symmetric_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(KL(P || Q) + KL(Q || P)) / 2 over the last dimension."""
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2


def smooth_loss(log_p: Tensor, segments: Tensor, distance: int = 1) -> Tensor:
    """L_Smooth: mean_t SymKL(P_t, P_{t-distance}); the gradient goes into both."""
    valid = same_document(segments, distance)[distance:]
    if not valid.any():
        return _nothing(log_p)
    return symmetric_kl(log_p[..., distance:, :], log_p[..., :-distance, :])[..., valid].mean(-1)


def lag_loss(log_p: Tensor, segments: Tensor, lags: Sequence[int] = LAGS) -> Tensor:
    """L_Lag: mean over the lags d of mean_t SymKL(P_t, P_{t-d}); lags longer than every document are left out."""
    usable = [d for d in lags if same_document(segments, d).any()]
    if not usable:
        return _nothing(log_p)
    return torch.stack([smooth_loss(log_p, segments, d) for d in usable]).mean(0)


def window_loss(p: Tensor, segments: Tensor, window: int) -> Tensor:
    """L_WS: mean over blocks of `window` steps of the entropy of the block's mean distribution.

    Blocks are counted from the start of each document. The last of a document may be shorter and weighs less, by its
    number of steps: with whole blocks alone this is the published mean.
    """
    blocks = _blocks(segments, window)
    sizes = torch.bincount(blocks)
    sums = torch.zeros(*p.shape[:-2], len(sizes), p.shape[-1], dtype=p.dtype, device=p.device)
    mean = sums.index_add(-2, blocks, p) / sizes[:, None]
    entropy = -torch.xlogy(mean, mean).sum(-1)
    return (entropy * sizes).sum(-1) / sizes.sum()


def trust_loss(log_p: Tensor, log_reference: Tensor) -> Tensor:
    """L_Trust: mean_t KL(P_t || P_t_ref), the new one first; no gradient flows into the reference."""
    return (log_p.exp() * (log_p - log_reference.detach())).sum(-1).mean(-1)


def margin_loss(
    values: Tensor, chosen: Tensor, held: Tensor, segments: Tensor, gap: float, reach: float, pairs: int
) -> Tensor:
    """Hinge at the top-k boundary: sum over pairs (u, v) of max(0, z_u - z_v + gap), mean over steps.

    u are experts that were chosen but are not cached, v those cached but not chosen. The weakest u meets the best v,
    the second weakest the second best, up to `pairs`: the cheapest swaps. A pair further apart than `reach` is left
    alone: there the router means it. `values` is what the top-k sorts by, `gap` and `reach` are in its units.
    """
    valid = same_document(segments, 1)
    if not valid.any():
        return _nothing(values)
    pairs = min(pairs, values.shape[-1] // 2)
    wanted = values.masked_fill(~(chosen & ~held).detach(), float("inf")).topk(pairs, dim=-1, largest=False).values
    ready = values.masked_fill(~(held & ~chosen).detach(), float("-inf")).topk(pairs, dim=-1).values
    distance = wanted - ready
    near = distance.isfinite() & (distance.detach() <= reach)  # infinite where either side has no more experts
    hinge = torch.where(near, distance, 0.0).add(gap).clamp_min(0.0) * near
    return hinge.sum(-1)[..., valid].mean(-1)


def miss_loss(values: Tensor, held: Tensor, segments: Tensor, top_k: int, softness: float) -> Tensor:
    """Experts on the wrong side of the top-k boundary, counted softly: mean_t of

        1/2K * ( sum over e not cached of sigmoid((z_e - theta) / s) + sum over e cached of sigmoid((theta - z_e) / s) )

    theta, half-way between the K-th and the (K+1)-th value, carries no gradient. The slope of the sigmoid is the chance
    that a little noise (s, `softness`) changes the choice: the gradient acts where a choice is nearly even, on both
    sides of the boundary, and leaves clear decisions alone.
    """
    valid = same_document(segments, 1)
    if not valid.any():
        return _nothing(values)
    boundary = values.detach().topk(top_k + 1, dim=-1).values[..., top_k - 1 :].mean(-1, keepdim=True)
    side = torch.where(held.detach(), -1.0, 1.0).to(values.dtype)
    wrong = (side * (values - boundary) / softness).sigmoid()
    return wrong.sum(-1)[..., valid].mean(-1) / (2 * top_k)


def _blocks(segments: Tensor, window: int) -> Tensor:
    """Number of the block that each token is in, ascending from 0."""
    steps = torch.arange(len(segments), device=segments.device)
    changed = torch.ones_like(segments, dtype=torch.bool)
    changed[1:] = segments[1:] != segments[:-1]
    start = torch.where(changed, steps, 0).cummax(0).values
    return (((steps - start) % window) == 0).cumsum(0) - 1


def _nothing(like: Tensor) -> Tensor:
    """Zero per layer, still part of the graph."""
    return like.flatten(-2)[..., :0].sum(-1)
