"""Next-token losses at the language model's head, without ever holding the logits of all tokens.

The head is the widest product of a small model: logits of 512 tokens over 49,152 words are 100 MB, several times over
for a loss and its gradient. The head itself is frozen, so the gradient for the hidden states is all that is needed, and
it is computed on the spot, chunk by chunk. N tokens, H hidden size, V words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
_CHUNK = 128  # tokens; logits of a chunk are walked through several times and should stay near the core


@dataclass(frozen=True)
class HeadLosses:
    """`total` = ce_weight * ce + kl_weight * kl carries the gradient. `ce` nats per token; `kl` KL(teacher || student)
    in nats per token and `agreement`, the share of tokens with the same best word: 0 and 1 without a teacher.
    """

    total: Tensor
    ce: float
    kl: float
    agreement: float


def head_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: Tensor | None,
    ce_weight: float,
    kl_weight: float,
    scale: float = 1.0,
) -> HeadLosses:
    """hidden [N, H] (after the last norm), head weight [V, H], targets [N] (IGNORED where there is none), teacher
    [N, H] or None; logits are scale * hidden @ weight^T. Means are over the tokens with a target.
    """
    keep = (targets != IGNORED).nonzero()[:, 0]
    if len(keep) == 0:
        return HeadLosses(hidden.sum() * 0.0, 0.0, 0.0, 1.0)
    chosen = None if teacher is None else teacher[keep]
    total, numbers = _HeadLosses.apply(hidden[keep], weight, targets[keep], chosen, ce_weight, kl_weight, scale)
    ce, kl, agreement = numbers.tolist()
    return HeadLosses(total, ce, kl, agreement)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: Tensor | None,
        ce_weight: float,
        kl_weight: float,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        wants_gradient = hidden.requires_grad
        gradient = torch.empty_like(hidden) if wants_gradient else None
        numbers = torch.zeros(3, dtype=torch.float64, device=hidden.device)
        numbers[2] = len(targets) if teacher is None else 0
        for start in range(0, len(targets), _CHUNK):
            rows = slice(start, start + _CHUNK)
            taught = None if teacher is None else teacher[rows]
            slope = _chunk(hidden[rows], weight, targets[rows], taught, ce_weight, kl_weight, scale, numbers)
            if gradient is not None:
                gradient[rows] = (slope.to(weight.dtype) @ weight) * (scale / len(targets))
        ctx.save_for_backward(gradient)
        numbers /= len(targets)
        ctx.mark_non_differentiable(numbers)
        return (ce_weight * numbers[0] + kl_weight * numbers[1]).float(), numbers

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else gradient * upstream[0].to(gradient.dtype), *(None,) * 6)


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: Tensor | None,
    ce_weight: float,
    kl_weight: float,
    scale: float,
    numbers: Tensor,
) -> Tensor:
    """Adds the sums of ce, kl and agreement to `numbers`; returns d total / d logits [n, V], before the mean."""
    logits = (hidden @ weight.T).float()
    if scale != 1.0:
        logits *= scale
    best = logits.argmax(-1) if teacher is not None else None
    log_p = logits.log_softmax(-1)
    numbers[0] -= log_p.gather(-1, targets[:, None]).double().sum()
    slope = log_p.exp()
    if teacher is None or best is None:
        slope.mul_(ce_weight)
    else:
        taught = (teacher @ weight.T).float()
        if scale != 1.0:
            taught *= scale
        numbers[2] += (taught.argmax(-1) == best).sum()
        log_q = taught.log_softmax(-1)
        q = log_q.exp()
        numbers[1] += (q * log_q.sub_(log_p)).double().sum()
        slope.mul_(ce_weight + kl_weight).sub_(q, alpha=kl_weight)
    slope.scatter_add_(-1, targets[:, None], slope.new_full((len(targets), 1), -ce_weight))
    return slope
