"""How much every expert is in demand: what the gate-aware policy keeps experts by.

    used_e   <- 0.98 used_e   + 0.02 (1 where e was chosen, else 0)       a mean over some fifty tokens
    wanted_e <- 0.8  wanted_e + 0.2  s_e / max s                          over some five; s: the gate's scores
    demand_e  = used_e + 0.1 wanted_e

The other policies know an expert only once it was chosen. The gate scores all of them for every token, and those that
nearly were chosen are chosen soon. docs/results/router-tuning.md has what that saves, and how the numbers were found.

Logits are rounded to fp16 first, as a trace records them: a simulated cache then evicts what the running one evicts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.config import RouterConfig

Array = np.ndarray[Any, np.dtype[Any]]

_USED, _WANTED = 0.98, 0.8  # what is left of either after one token
_SHARE = 0.1  # of `wanted` in the demand


class Demand:
    """Demand for the experts of L layers, which all start with none. `values` float64 [L, E] changes in place."""

    def __init__(self, layers: int, rules: RouterConfig) -> None:
        shape = (layers, rules.num_experts)
        self.values: Array = np.zeros(shape)
        self._used, self._wanted = np.zeros(shape), np.zeros(shape)
        self._rules = rules

    def see(self, layer: int, logits: Array, experts: Array) -> None:
        """Tokens that follow each other in the layer at that position: gate logits [S, E], chosen experts [S, K]."""
        used, wanted = self._used[layer], self._wanted[layer]
        scores = self._scores(logits)
        if len(scores) == 1:  # a decode step; what follows would give the same in twice the time
            used *= _USED
            used[experts[0]] += 1 - _USED
            wanted *= _WANTED
            wanted += (1 - _WANTED) * scores[0]
        else:
            chosen = np.zeros(scores.shape)
            chosen[np.arange(len(chosen))[:, None], experts] = 1.0
            _fade(used, _USED, chosen)
            _fade(wanted, _WANTED, scores)
        self.values[layer] = used + _SHARE * wanted

    def clear(self) -> None:
        """Forget everything."""
        for values in (self.values, self._used, self._wanted):
            values[:] = 0.0

    def _scores(self, logits: Array) -> Array:
        """Over the largest of their row, [S, E]."""
        rounded = logits.astype(np.float16, copy=False).astype(np.float64)
        if self._rules.scoring == "softmax":
            best = np.maximum.reduce(rounded, axis=-1, keepdims=True)
            return np.exp(rounded - best)
        scores = 0.5 + 0.5 * np.tanh(0.5 * rounded)
        return scores / np.maximum.reduce(scores, axis=-1, keepdims=True)


def _fade(mean: Array, left: float, rows: Array) -> None:
    """Take rows [S, E] into a mean [E] of which `left` remains per row."""
    ages = np.arange(len(rows) - 1, -1, -1.0)[:, None]
    mean *= left ** len(rows)
    mean += ((1 - left) * left**ages * rows).sum(axis=0)
