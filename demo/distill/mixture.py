"""The feed-forward part as a mixture while it is trained: frozen neurons of the dense layer, a gate, a low-rank change.

Copies of a neuron share their weights, so one pass over the I neurons of the dense layer serves all experts: a routed
neuron counts with the sum of the weights of the chosen experts that hold it. Weights are c * softmax(gate h), not
normalised over the chosen ones (as in Qwen1.5-MoE and DeepSeek-V2-Lite); c becomes a factor of `down`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from demo.distill import RANK, TOP_K
from demo.distill.network import Layer
from demo.distill.split import HOMES, Split


@dataclass(frozen=True)
class Routed:
    """One pass through a mixture of T tokens: output [T, H], chosen experts [T, k], and the balance term."""

    output: torch.Tensor
    experts: torch.Tensor
    balance: torch.Tensor


class Mixture(nn.Module):
    """`gate` [E, H], `log_scale` (log c) and the low-rank changes train; neurons stand shared first, then routed."""

    def __init__(self, layer: Layer, split: Split, gate: torch.Tensor, log_scale: float, rank: int = RANK) -> None:
        super().__init__()
        inner, hidden = layer.down.shape[1], layer.down.shape[0]
        order = torch.cat([split.shared, split.routed])
        self._gate_up = torch.cat([layer.gate_up[order], layer.gate_up[inner + order]])
        self._down = layer.down[:, order].contiguous()
        self.split = split
        self._members = split.membership()
        self._shared = len(split.shared)
        self.gate = nn.Parameter(gate.clone())
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        self.in_a = nn.Parameter(torch.randn(rank, hidden) / math.sqrt(hidden))
        self.in_b = nn.Parameter(torch.zeros(2 * inner, rank))
        self.out_a = nn.Parameter(torch.randn(rank, inner) / math.sqrt(inner))
        self.out_b = nn.Parameter(torch.zeros(hidden, rank))

    def forward(self, h: torch.Tensor, top_k: int = TOP_K) -> Routed:
        """Normed input h [T, H] float32."""
        probabilities = F.linear(h, self.gate).softmax(-1)
        best = probabilities.topk(top_k, dim=-1)
        weights = torch.zeros_like(probabilities).scatter(1, best.indices, best.values)
        counts = (weights * self.log_scale.exp()) @ self._members
        gate, up = (F.linear(h, self._gate_up) + F.linear(F.linear(h, self.in_a), self.in_b)).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        inner = torch.cat([inner[:, : self._shared], inner[:, self._shared :] * counts], dim=1)
        output = F.linear(inner, self._down) + F.linear(F.linear(inner, self.out_a), self.out_b)
        return Routed(output, best.indices, _balance(probabilities, best.indices))


def _balance(probabilities: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """E * sum_e mean probability * share of the choices (Switch Transformer, arXiv 2101.03961): 1 when balanced."""
    load = torch.zeros_like(probabilities).scatter(1, experts, 1.0).mean(0) / experts.shape[1]
    return probabilities.shape[1] * (probabilities.mean(0) * load).sum()


def initial_gate(h: torch.Tensor, layer: Layer, split: Split) -> tuple[torch.Tensor, float]:
    """(gate [E, H], log c): ridge regression of the log of every expert's output norm on the inputs h [T, H].

    The layout has no router bias: the bias found goes along the mean of h, as normed inputs have a stable mean.
    """
    energies = torch.stack([_expert_norm(h, layer, neurons) for neurons in split.experts], dim=1)
    target = (energies + 1e-4).log()
    target = target - target.mean(0)
    inputs = torch.cat([h, torch.ones(len(h), 1)], dim=1)
    gram = inputs.T @ inputs
    gram += 1e-2 * gram.diagonal().mean() * torch.eye(len(gram))
    solution = torch.linalg.solve(gram, inputs.T @ target)
    bias, mean = solution[-1] - solution[-1].mean(), h.mean(0)
    gate = solution[:-1].T + torch.outer(bias, mean / mean.dot(mean))
    chosen = F.linear(h, gate).softmax(-1).topk(TOP_K, dim=1).values.mean()
    return gate.contiguous(), -math.log(HOMES * chosen.item())


def _expert_norm(h: torch.Tensor, layer: Layer, neurons: torch.Tensor) -> torch.Tensor:
    inner = layer.down.shape[1]
    active = F.silu(F.linear(h, layer.gate_up[neurons])) * F.linear(h, layer.gate_up[inner + neurons])
    return F.linear(active, layer.down[:, neurons]).norm(dim=1)
