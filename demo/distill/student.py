"""The dense network with mixtures in place of its feed-forward layers, and what a training step compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from demo.distill import TOP_K
from demo.distill.mixture import Mixture, Routed
from demo.distill.network import Network


@dataclass(frozen=True)
class Pass:
    """`hidden`: the residual stream [B, S, H] after the layers asked for and after the last; `routed` by layer."""

    hidden: list[torch.Tensor]
    routed: list[Routed]


class Student(nn.Module):
    """Attention, norms and head of the dense network (frozen) around trained mixtures."""

    def __init__(self, network: Network, mixtures: Sequence[Mixture]) -> None:
        super().__init__()
        self.network = network
        self.mixtures = nn.ModuleList(mixtures)

    def forward(self, rows: torch.Tensor, keep: Sequence[int] = (), top_k: int = TOP_K) -> Pass:
        """rows [B, S] of token ids."""
        network = self.network
        rope = network.rope(torch.arange(rows.shape[1]))
        x, hidden, routed = network.embedding[rows], [], []
        for number, (layer, mixture) in enumerate(zip(network.layers, self.mixtures, strict=True)):
            x = network.attention(layer, x, rope)
            h = network.normalise(x, layer.mlp_norm)
            result = mixture(h.flatten(0, 1), top_k)
            x = x + result.output.view_as(x)
            routed.append(result)
            if number in keep:
                hidden.append(x)
        return Pass([*hidden, x], routed)


def dense_pass(network: Network, rows: torch.Tensor, keep: Sequence[int]) -> list[torch.Tensor]:
    """`Pass.hidden` of the dense network itself."""
    rope = network.rope(torch.arange(rows.shape[1]))
    x, hidden = network.embedding[rows], []
    with torch.no_grad():
        for number, layer in enumerate(network.layers):
            x = network.attention(layer, x, rope)
            x = x + network.mlp(layer, network.normalise(x, layer.mlp_norm))
            if number in keep:
                hidden.append(x)
    return [*hidden, x]


def divergence(network: Network, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || student) of the next-token distributions at last hidden states [P, H]."""
    with torch.no_grad():
        wanted = network.logits(teacher).log_softmax(-1)
    return F.kl_div(network.logits(student).log_softmax(-1), wanted, log_target=True, reduction="batchmean")
