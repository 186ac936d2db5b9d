"""Recorded routing in the place of the router's: what a recording costs on this machine, whatever the model says.

The gate is computed all the same and its choice thrown away, so that a token takes the time it takes with a router;
looking up what was recorded adds some ten microseconds per layer (12 measured on a server's core, beside 30 of the
gate). With a recording that is not of this model, the text that comes out means nothing.

The recording is read token by token from its first row, whatever the tokens are: a prompt of S tokens takes its first S
rows, in one step or in several, each decode step one more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from runtime.config import ModelConfig
from runtime.errors import UsageError
from runtime.router import Observer, Routed, Router, choose, weigh

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Steps:
    """What the tokens of one sequence were routed to: N tokens, L layers with experts, K experts of each token.

    `experts` whole numbers [N, L, K] below `num_experts`, `weights` floating point [N, L, K].
    """

    moe_layers: tuple[int, ...]
    num_experts: int
    experts: Array
    weights: Array

    def __len__(self) -> int:
        return len(self.experts)

    def check(self, config: ModelConfig) -> None:
        """Raises UsageError when they are of another shape than the model, or no routing at all."""
        shape = self.experts.shape
        if len(shape) != 3 or shape != self.weights.shape or shape[1] != len(self.moe_layers) or not len(self):
            raise UsageError(
                f"recorded routing: experts {list(shape)} and weights {list(self.weights.shape)} are not both "
                f"[tokens, {len(self.moe_layers)} layers, experts of a token]"
            )
        found = (self.num_experts, shape[2], self.moe_layers)
        wanted = (config.router.num_experts, config.router.top_k, config.moe_layers)
        if found != wanted:
            raise UsageError(
                f"this routing was recorded from a model with {_shape(*found)}, the bundle has {_shape(*wanted)}: "
                "replay a recording of this shape"
            )
        ordered = np.sort(self.experts, axis=-1)
        if int(ordered.min()) < 0 or int(ordered.max()) >= self.num_experts:
            raise UsageError(f"recorded routing: an expert is not one of 0 to {self.num_experts - 1}")
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise UsageError("recorded routing: a token names one expert twice in a layer")


class ReplayRouter:
    """A router that computes its gates and answers what was recorded. A new sequence begins with the first row."""

    def __init__(self, router: Router, model: ModelConfig, steps: Steps, device: torch.device) -> None:
        """Raises UsageError for steps that are not of this model's shape."""
        steps.check(model)
        self.observer: Observer | None = None
        self._router, self._count = router, len(steps)
        by_layer = [
            torch.from_numpy(np.ascontiguousarray(values.swapaxes(0, 1), dtype)).to(device)
            for values, dtype in ((steps.experts, np.int64), (steps.weights, np.float32))
        ]
        self._recorded = dict(zip(model.moe_layers, zip(*by_layer, strict=True), strict=True))
        self.begin()

    def begin(self) -> None:
        """A new sequence starts: back to the first row."""
        self._next = dict.fromkeys(self._recorded, 0)

    def route(self, layer: int, h: torch.Tensor) -> Routed:
        """The next S rows of the layer for h [S, H]: experts [S, K] int64 and weights [S, K] fp32.

        Raises UsageError when the recording has no more of them.
        """
        logits = self._router.logits(layer, h)
        chosen, scores = choose(self._router.config, logits, self._router.biases.get(layer))
        weigh(self._router.config, scores, chosen)
        start = self._next[layer]
        end = self._next[layer] = start + len(h)
        if end > self._count:
            raise UsageError(f"the recorded routing is of {self._count} tokens, but token {end} was reached")
        experts, weights = (values[start:end] for values in self._recorded[layer])
        if self.observer is not None:
            self.observer(layer, h, logits, experts, weights)
        return Routed(experts, weights, logits)

    def guess(self, layer: int, h: torch.Tensor) -> list[int]:
        """Nothing: what was recorded does not follow from h, and to look it up would be no guess."""
        return []


def _shape(experts: int, top_k: int, layers: tuple[int, ...]) -> str:
    where = f"layers {layers[0]} to {layers[-1]}" if layers else "no layer"
    return f"the top {top_k} of {experts} experts in {len(layers)} layers ({where})"
