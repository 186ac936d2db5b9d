"""Next-token losses at the language model's head, without ever holding the logits of all tokens.

The head is the widest product of a small model: logits of 512 tokens over 49,152 words are 100 MB, several times over
for a loss and its gradient. The head itself is frozen, so the gradient for the hidden states is all that is needed, and
it is computed on the spot, chunk by chunk. N tokens, H hidden size, V words.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    task = _Task(weight, targets, teacher, ce_weight, kl_weight, scale)
    total, numbers = _HeadLosses.apply(hidden[keep], task.of(keep))
    ce, kl, agreement = numbers.tolist()
    return HeadLosses(total, ce, kl, agreement)


@dataclass(frozen=True)
class _Task:
    """What hidden states are judged by, as in `head_losses`."""

    weight: Tensor
    targets: Tensor
    teacher: Tensor | None
    ce_weight: float
    kl_weight: float
    scale: float

    def of(self, rows: Tensor | slice) -> _Task:
        """For some of the tokens."""
        taught = None if self.teacher is None else self.teacher[rows]
        return replace(self, targets=self.targets[rows], teacher=taught)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, task: _Task) -> tuple[Tensor, Tensor]:
        wants_gradient, weight, count = hidden.requires_grad, task.weight, len(task.targets)
        gradient = torch.empty_like(hidden) if wants_gradient else None
        numbers = torch.zeros(3, dtype=torch.float64, device=hidden.device)
        numbers[2] = count if task.teacher is None else 0
        for start in range(0, count, _CHUNK):
            rows = slice(start, start + _CHUNK)
            slope = _chunk(hidden[rows], task.of(rows), numbers)
            if gradient is not None:
                gradient[rows] = (slope.to(weight.dtype) @ weight) * (task.scale / count)
        ctx.save_for_backward(gradient)
        numbers /= count
        ctx.mark_non_differentiable(numbers)
        return (task.ce_weight * numbers[0] + task.kl_weight * numbers[1]).float(), numbers

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * upstream[0].to(gradient.dtype), None


def _chunk(hidden: Tensor, task: _Task, numbers: Tensor) -> Tensor:
    """Adds the sums of ce, kl and agreement to `numbers`; returns d total / d logits [n, V], before the mean."""
    targets, teacher = task.targets, task.teacher
    logits = _logits(hidden, task)
    best = logits.argmax(-1) if teacher is not None else None
    log_p = logits.log_softmax(-1)
    numbers[0] -= log_p.gather(-1, targets[:, None]).double().sum()
    slope = log_p.exp()
    if teacher is None or best is None:
        slope.mul_(task.ce_weight)
    else:
        taught = _logits(teacher, task)
        numbers[2] += (taught.argmax(-1) == best).sum()
        log_q = taught.log_softmax(-1)
        q = log_q.exp()
        numbers[1] += (q * log_q.sub_(log_p)).double().sum()
        slope.mul_(task.ce_weight + task.kl_weight).sub_(q, alpha=task.kl_weight)
    slope.scatter_add_(-1, targets[:, None], slope.new_full((len(targets), 1), -task.ce_weight))
    return slope


def _logits(hidden: Tensor, task: _Task) -> Tensor:
    logits = (hidden @ task.weight.T).float()
    return logits if task.scale == 1.0 else logits.mul_(task.scale)
