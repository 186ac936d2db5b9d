"""First stage: every layer by itself learns to give the dense layer's output from the dense layer's input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from demo.distill import EXPERTS, SHARED
from demo.distill.mixture import Mixture, initial_gate
from demo.distill.network import Layer, Network
from demo.distill.split import split_neurons


@dataclass(frozen=True)
class LocalOptions:
    """Steps of `batch` tokens drawn at random; Adam with a linear fall of the learning rate."""

    steps: int = 90
    batch: int = 1024
    learning_rate: float = 2e-3
    balance: float = 0.1
    sample: int = 8192  # tokens whose activity decides the split
    shared: int = SHARED
    experts: int = EXPERTS


@dataclass(frozen=True)
class LocalReport:
    """Share of the output's variance that is missing, before and after training, on the last tenth of the tokens."""

    before: float
    after: float


def feed_forward_inputs(network: Network, rows: torch.Tensor) -> torch.Tensor:
    """Normed inputs of every feed-forward layer [layers, tokens, H] fp16 for rows [B, S] of token ids."""
    rope = network.rope(torch.arange(rows.shape[1]))
    kept = torch.empty(len(network.layers), rows.numel(), network.config.hidden_size, dtype=torch.float16)
    with torch.inference_mode():
        for at, row in enumerate(rows):
            x = network.embedding[row][None]
            for number, layer in enumerate(network.layers):
                x = network.attention(layer, x, rope)
                h = network.normalise(x, layer.mlp_norm)
                kept[number, at * len(row) : (at + 1) * len(row)] = h[0]
                x = x + network.mlp(layer, h)
    return kept


def fit_layers(network: Network, inputs: torch.Tensor, options: LocalOptions) -> Iterator[tuple[Mixture, LocalReport]]:
    """A trained mixture per layer, for inputs as `feed_forward_inputs` gives them."""
    for number, layer in enumerate(network.layers):
        torch.manual_seed(number)
        yield fit_layer(network, layer, inputs[number].float(), options, seed=number)


def fit_layer(
    network: Network, layer: Layer, h: torch.Tensor, options: LocalOptions, seed: int
) -> tuple[Mixture, LocalReport]:
    """Split one layer by its inputs h [T, H], start its gate, and train gate and low-rank change on them."""
    h, unseen = h[: -len(h) // 10], h[-len(h) // 10 :]
    with torch.no_grad():
        some = h[torch.randperm(len(h))[: options.sample]]
        gate, up = F.linear(some, layer.gate_up).chunk(2, dim=-1)
        contributions = (F.silu(gate) * up).abs() * layer.down.norm(dim=0)
        split = split_neurons(contributions, options.shared, options.experts, seed)
        mixture = Mixture(layer, split, *initial_gate(some, layer, split))
        before = _missing(mixture(unseen).output, network.mlp(layer, unseen))
    optimizer = torch.optim.Adam(mixture.parameters(), lr=options.learning_rate, betas=(0.9, 0.98))
    for step in range(options.steps):
        optimizer.param_groups[0]["lr"] = options.learning_rate * min(1, (step + 1) / 10) * (1 - step / options.steps)
        batch = h[torch.randint(len(h), (options.batch,))]
        with torch.no_grad():
            target = network.mlp(layer, batch)
        routed = mixture(batch)
        loss = _missing(routed.output, target) + options.balance * routed.balance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = _missing(mixture(unseen).output, network.mlp(layer, unseen))
    return mixture, LocalReport(before.item(), after.item())


def _missing(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().sum() / (target - target.mean(0)).square().sum()
