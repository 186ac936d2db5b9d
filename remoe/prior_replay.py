"""Cache-prior routing over a recorded trace: every decode step is routed again, towards what the simulated cache holds.

Open loop: the logits are those of the recorded run. In a running engine (closed loop) another expert changes the
hidden state, and so the logits of the layers and tokens after it. Recorded logits are rounded to fp16, so a choice
between two experts that are as good as equal may fall the other way, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from remoe.pools import Slots
from remoe.trace import Trace
from runtime.errors import UsageError
from runtime.prior_rows import Spread, prefer_cached

if TYPE_CHECKING:
    from runtime.cache_prior import CachePrior  # which imports torch

Array = np.ndarray[Any, np.dtype[Any]]


class PriorChooser:
    """Gives the keys of each decode step, in turn; `experts` [N, L, K] is what was chosen so far."""

    def __init__(self, trace: Trace, options: CachePrior, shared: bool) -> None:
        """`shared`: all layers use one cache, so a layer is routed after the one before it has been served.

        Raises UsageError for a trace without logits.
        """
        if trace.logits is None:
            raise UsageError("cache-prior routing needs the logits of a trace: record it with `edge trace --logits`")
        self._logits, self._rules, self._options, self._shared = trace.logits, trace.info.rules, options, shared
        self._bias = None if trace.choice_bias is None else np.array(trace.choice_bias)
        layers = len(trace.info.moe_layers)
        self._groups = [slice(layer, layer + 1) for layer in range(layers)] if shared else [slice(0, layers)]
        self._shape = (layers, trace.info.num_experts)
        self.experts: Array = trace.experts.copy()
        self._same = self._asked = 0

    @property
    def agreement(self) -> float | None:
        """Share of the chosen experts that the router itself would have chosen."""
        return self._same / self._asked if self._asked else None

    def begin(self, prompt: range) -> None:
        """A new request, whose prompt counts for the mean spread."""
        self._spread = Spread()
        for row in prompt:
            self._spread.update(self._row(row), together=False)

    def keys(self, row: int, pools: Sequence[Slots]) -> Iterator[list[int]]:
        """One list of keys per layer, each worked out when it is asked for."""
        logits = self._row(row)
        spread = self._spread.update(logits, together=False)
        for group in self._groups:
            bias = None if self._bias is None else self._bias[group]
            cached, full = self._cached(pools, group), np.array([[pool.full] for pool in pools[group]])
            found = prefer_cached(self._options, self._rules, logits[group], bias, cached, full, spread[group])
            self._same += int((found.experts[:, :, None] == found.stock[:, None, :]).sum())
            self._asked += found.experts.size
            self.experts[row, group] = found.experts
            offsets = np.arange(self._shape[0])[group, None] * self._shape[1]
            yield from (found.experts + offsets).tolist()

    def _row(self, row: int) -> Array:
        return self._logits[row].astype(np.float32)

    def _cached(self, pools: Sequence[Slots], group: slice) -> Array:
        """What is in the caches of these layers: bool [layers of the group, E]."""
        low, high = group.start * self._shape[1], group.stop * self._shape[1]
        here = {id(pool): pool for pool in pools[group]}  # a shared pool stands for all layers
        mask = np.zeros((group.stop - group.start, self._shape[1]), dtype=bool)
        mask.reshape(-1)[[key - low for pool in here.values() for key in pool.resident if low <= key < high]] = True
        return mask
