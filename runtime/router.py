"""The router: gate logits to top-k experts and their weights.

logits = W h                       fp32, whatever the compute dtype: margins at the top-k boundary are tiny
scores = softmax(logits) or sigmoid(logits)
choice = scores (+ choice_bias), experts outside the best groups left out
experts = the top k of choice, largest first
weights = scores of those experts (/ their sum) * scale
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from runtime.bundle import Bundle
from runtime.config import ModelConfig, RouterConfig
from runtime.dense import load_tensors
from runtime.errors import BundleError, UsageError
from runtime.layout import BASE_ROUTER, router_tensors
from runtime.router_file import check_base, gates_sha256, load_router

# Sees layer, h [S, H], logits [S, E], experts and weights [S, K] of every call, before anything is computed with them.
Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


class Routed(NamedTuple):
    """S tokens of a layer: `experts` [S, K] int64 and `weights` [S, K] fp32, the best first; `logits` [S, E] fp32."""

    experts: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor


class Routing(Protocol):
    """What the decoder asks a router."""

    observer: Observer | None

    def begin(self) -> None:
        """A new sequence starts."""
        ...

    def route(self, layer: int, h: torch.Tensor) -> Routed:
        """Send h [S, H] to experts."""
        ...

    def guess(self, layer: int, h: torch.Tensor) -> list[int]:
        """What one token h [1, H] of an earlier layer would be sent to here, the likeliest first."""
        ...


class Router:
    """Gate weights of every MoE layer: layer_NN.weight [E, H] fp32 and, where the family has it, choice_bias [E]."""

    def __init__(self, config: ModelConfig, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        self.config: RouterConfig = config.router
        self.observer: Observer | None = None
        self.layers = config.moe_layers
        self._weights = {n: tensors[f"layer_{n:02d}.weight"].to(device) for n in config.moe_layers}
        self.biases = {
            n: tensors[f"layer_{n:02d}.choice_bias"].to(device) for n in config.moe_layers if config.router.choice_bias
        }

    @classmethod
    def load(cls, bundle: Bundle, name: str, device: torch.device) -> Router:
        """By the name of a router in the bundle, or the path of a router file for the same model.

        Raises UsageError when there is neither, BundleError when the file is not a router of this model,
        or was tuned from another one.
        """
        shapes = router_tensors(bundle.config)
        if name in bundle.routers():
            return cls(bundle.config, load_tensors(bundle, f"routers/{name}.safetensors", shapes), device)
        path, model = Path(name), bundle.manifest.source.name
        if not path.is_file():
            raise UsageError(f"no router {name!r} (in the bundle: {', '.join(bundle.routers())}; or give a file)")
        try:
            tensors, provenance = load_router(path, shapes)
        except BundleError as error:
            raise BundleError(f"{error}; {path} is not a router of {model}") from None
        if provenance is not None:
            base = load_tensors(bundle, BASE_ROUTER, shapes)
            check_base(provenance, gates_sha256(base), path, model)
        return cls(bundle.config, tensors, device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The gates by the names of a router file."""
        weights = {f"layer_{n:02d}.weight": weight for n, weight in self._weights.items()}
        return weights | {f"layer_{n:02d}.choice_bias": bias for n, bias in self.biases.items()}

    def begin(self) -> None:
        """A new sequence starts: nothing to forget."""

    def route(self, layer: int, h: torch.Tensor) -> Routed:
        """Send h [S, H] to experts."""
        logits = self.logits(layer, h)
        experts, scores = choose(self.config, logits, self.biases.get(layer))
        weights = weigh(self.config, scores, experts)
        if self.observer is not None:
            self.observer(layer, h, logits, experts, weights)
        return Routed(experts, weights, logits)

    def guess(self, layer: int, h: torch.Tensor) -> list[int]:
        """What this layer's gate makes of h [1, H] as an earlier layer's gate saw it: hidden states change little from
        layer to layer, and of the experts chosen so some 80 % are chosen indeed.
        """
        experts: list[int] = choose(self.config, self.logits(layer, h), self.biases.get(layer))[0][0].tolist()
        return experts

    def logits(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """h [S, H] to gate logits [S, E] fp32."""
        return torch.nn.functional.linear(h.float(), self._weights[layer])


def choose(config: RouterConfig, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [S, E] and the layer's choice bias [E] to the experts that are chosen [S, K], and all scores [S, E]."""
    scores = logits.softmax(-1) if config.scoring == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if config.num_groups > 1:
        choice = _limit_groups(config, choice)
    return choice.topk(config.top_k).indices, scores


def weigh(config: RouterConfig, scores: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Weights [S, K] of the experts [S, K]."""
    weights = scores.gather(-1, experts)
    if config.normalise:
        # Sigmoid scores of experts that a bias has chosen may all be 0; other sums are not changed by so little.
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * config.scale if config.scale != 1.0 else weights


def _limit_groups(config: RouterConfig, choice: torch.Tensor) -> torch.Tensor:
    """Leave out the experts of all but the best groups (DeepSeek's node-limited routing)."""
    grouped = choice.unflatten(-1, (config.num_groups, -1))
    if config.group_score == "max":
        group_scores = grouped.amax(-1)
    else:
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
    best = group_scores.topk(config.top_groups, dim=-1).indices
    allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, best, True)
    return grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
