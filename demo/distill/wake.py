"""Experts that hardly any token chooses are woken: they would get no gradient, and be dead weight on the disk.

The layout has no router bias, but normed inputs have a stable mean: a step along it raises an expert's logit for every
token by nearly the same amount. The step is found by trial on the inputs that the layer really sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from demo.distill import TOP_K
from demo.distill.student import Student

LEAST = 0.35  # of the mean load of a layer
_ROUNDS, _STEP = 60, 0.05


def wake_experts(student: Student, rows: torch.Tensor, top_k: int = TOP_K) -> list[float]:
    """Raise experts whose share of their layer's mean load on rows [B, S] is below LEAST.

    Returns the least share of each layer as it was. All layers are looked at in one pass, the upper ones before those
    below them have changed: what changes is little.
    """
    inputs: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Callable[[Any, Any], None]:
        return lambda module, given: inputs.__setitem__(number, given[0])

    hooks = [mixture.register_forward_pre_hook(keep(i)) for i, mixture in enumerate(student.mixtures)]
    with torch.no_grad():
        student(rows, top_k=top_k)
        for hook in hooks:
            hook.remove()
        return [raise_idle(mixture, inputs[i], top_k) for i, mixture in enumerate(student.mixtures)]


def raise_idle(mixture: Any, h: torch.Tensor, top_k: int) -> float:
    logits, mean = F.linear(h, mixture.gate), h.mean(0)
    along = (h @ mean / mean.dot(mean))[:, None]  # 1 on average
    raised, step = torch.zeros(logits.shape[1]), _STEP * logits.std()
    before = 0.0
    for number in range(_ROUNDS):
        chosen = (logits + along * raised).topk(top_k, dim=-1).indices
        shares = torch.bincount(chosen.flatten(), minlength=len(raised)) * len(raised) / chosen.numel()
        if number == 0:
            before = shares.min().item()
        if shares.min() >= LEAST:
            break
        raised += step * (shares < LEAST)
    mixture.gate += torch.outer(raised, mean / mean.dot(mean))
    return before
