"""The cache-prior rule for single tokens, in numpy: what the running engine and a simulated cache both go by.

A row takes some fifteen operations on as many numbers as a layer has experts. In torch each of them costs more than
its arithmetic, and on a GPU a launch; here the logits are copied once. Shapes: S rows, E experts, K of them chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtime.config import RouterConfig

if TYPE_CHECKING:
    from runtime.cache_prior import CachePrior

Array = np.ndarray[Any, np.dtype[Any]]


class Preferred(NamedTuple):
    """Of S rows: `experts` int64 [S, K], `stock`, the router's own, and `scores` float64 [S, E], the true ones."""

    experts: Array
    stock: Array
    scores: Array


class Spread:
    """Running mean of max z - min z over the tokens of a sequence; rows of one layer, or one row per layer."""

    def __init__(self) -> None:
        self._sum: Array | float = 0.0
        self._count = 0
        self.mean: Array = np.zeros((1, 1))  # as `update` returned it

    def update(self, logits: Array, together: bool = True) -> Array:
        """Take logits [S, E] into the mean and return it: float64 [1, 1] over all rows, or one per row [S, 1]."""
        spreads = (logits.max(axis=-1) - logits.min(axis=-1)).astype(np.float64)
        self._sum = self._sum + (spreads.sum(keepdims=True) if together else spreads)
        self._count += len(logits) if together else 1
        self.mean = np.asarray(self._sum / self._count)[:, None]
        return self.mean


def prefer_cached(
    options: CachePrior,
    rules: RouterConfig,
    logits: Array,
    bias: Array | None,
    cached: Array,
    full: Array,
    spread: Array,
) -> Preferred:
    """Rows that each have a cache of their own: logits fp32 [S, E], choice bias [E] or [S, E], what is in the row's
    cache bool [S, E] and whether that is full [S, 1], its mean spread [S, 1].
    """
    wide = logits.astype(np.float64)
    scores = _scores(rules, wide)
    stock = _choose(rules, scores, bias)
    preferred = cached.copy()
    preferred[_rows(stock), stock[:, : options.top_j]] = True
    leaning = _lean(options, rules, wide, scores, preferred, full, spread)
    return Preferred(_choose(rules, leaning, bias), stock, scores)


def weigh_preferred(options: CachePrior, rules: RouterConfig, found: Preferred) -> Array:
    """Weights fp32 [S, K] of the preferred experts, as runtime.router.weigh gives them, and by energy with the sum of
    the router's own.
    """
    weights = found.scores[_rows(found.experts), found.experts]
    if rules.normalise:
        weights /= weights.sum(axis=-1, keepdims=True) + 1e-20
    elif options.keeps_sum(rules):
        own = found.scores[_rows(found.stock), found.stock].sum(axis=-1, keepdims=True)
        weights *= own / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    weights *= rules.scale
    return weights.astype(np.float32)


def _lean(
    options: CachePrior,
    rules: RouterConfig,
    logits: Array,
    scores: Array,
    preferred: Array,
    full: Array,
    spread: Array,
) -> Array:
    """Scores [S, E] by which to choose."""
    if options.strength == 0:
        return scores
    if options.scaling == "energy":
        best = _best(scores, rules.top_k).sum(axis=-1, keepdims=True)
        share = np.where(preferred, 1.0, np.where(full, 0.0, options.free_share))
        energy = np.sqrt(scores**2 + share * (options.strength * best) ** 2)
        if rules.scoring == "sigmoid":
            energy = np.minimum(energy, 1.0)  # choice biases are made for scores of at most 1
        return np.where(share > 0, energy, scores)
    if options.scaling == "token":
        best = _best(logits, rules.top_k)
        spread = best.max(axis=-1, keepdims=True) - best.min(axis=-1, keepdims=True)
    return _scores(rules, np.where(preferred, logits + options.strength * spread, logits))


def _scores(rules: RouterConfig, logits: Array) -> Array:
    if rules.scoring == "softmax":
        scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        return scores
    return 0.5 + 0.5 * np.tanh(0.5 * logits)  # the sigmoid, which cannot overflow this way


def _choose(rules: RouterConfig, scores: Array, bias: Array | None) -> Array:
    """The K best of each row, the best first; of equals the first."""
    choice = scores if bias is None else scores + bias
    if rules.num_groups > 1:
        choice = _limit_groups(rules, choice)
    return (-choice).argsort(axis=-1, kind="stable")[:, : rules.top_k]


def _limit_groups(rules: RouterConfig, choice: Array) -> Array:
    """Leave out the experts of all but the best groups, as runtime.router does."""
    grouped = choice.reshape(len(choice), rules.num_groups, -1)
    found = grouped.max(axis=-1) if rules.group_score == "max" else _best(grouped, 2).sum(axis=-1)
    groups = (-found).argsort(axis=-1, kind="stable")[:, : rules.top_groups]
    allowed = np.zeros(found.shape, dtype=bool)
    allowed[_rows(groups), groups] = True
    return np.where(allowed[..., None], grouped, -np.inf).reshape(choice.shape)


def _rows(indices: Array) -> Array:
    """Row numbers beside indices [S, n]; numpy's functions for this take three times as long."""
    return np.arange(len(indices))[:, None]


def _best(values: Array, count: int) -> Array:
    """The largest `count` values of the last axis, in no order."""
    return np.partition(values, -count, axis=-1)[..., -count:]
