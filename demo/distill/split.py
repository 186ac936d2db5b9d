"""Which neurons of a dense feed-forward layer become the shared expert, and which routed expert holds which others.

Shared are the neurons that contribute most, summed over tokens. The others are put into E clusters of neurons that
speak for the same tokens (balanced k-means on co-activation). Then every neuron gets two more homes, the best clusters
that do not hold it yet: so an expert has 3 R / E neurons, and the experts of a token seldom lack the same thing.

Shapes: T tokens, H hidden, I neurons, S shared neurons, R = I - S routed neurons, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

HOMES = 3  # experts that hold one routed neuron
_LOUD_SHARE = 1 / 3  # of all neurons: the loudest of a token, which count for being shared
_ACTIVE_SHARE = 1 / 6  # of the routed neurons: those of a token that count as active
_SKETCH = 256  # dimensions of the random projection of a neuron's activity
_ROUNDS = 8


@dataclass(frozen=True)
class Split:
    """`shared` [S] and `experts` [E, HOMES * R / E]: numbers of neurons, int64; rows of `experts` in rising order."""

    shared: torch.Tensor
    experts: torch.Tensor

    @property
    def routed(self) -> torch.Tensor:
        """The routed neurons [R], each once, in rising order."""
        return self.experts.unique()

    def membership(self) -> torch.Tensor:
        """[E, R] float32: 1 where the expert holds the neuron of `routed`."""
        return (self.experts[:, :, None] == self.routed).any(1).float()


def split_neurons(contributions: torch.Tensor, shared: int, experts: int, seed: int) -> Split:
    """Split by contributions [T, I]: |activation| times the norm of the neuron's `down` column."""
    total = contributions.shape[1]
    loud = contributions.topk(round(total * _LOUD_SHARE), dim=1)
    score = torch.zeros(total).index_add_(0, loud.indices.flatten(), loud.values.square().flatten())
    best = score.topk(shared).indices.sort().values
    routed = torch.ones(total, dtype=torch.bool).index_fill_(0, best, False).nonzero().squeeze(1)
    sketches = _sketches(contributions[:, routed], seed)
    homes = find_homes(sketches, experts, seed)
    rows = [routed[np.flatnonzero((homes == e).any(1))] for e in range(experts)]
    return Split(best, torch.stack(rows))


def _sketches(contributions: torch.Tensor, seed: int) -> npt.NDArray[np.float32]:
    """A unit vector [R, _SKETCH] per neuron: when it is active, in a random projection."""
    count = round(contributions.shape[1] * _ACTIVE_SHARE)
    active = (contributions >= contributions.topk(count, dim=1).values[:, -1:]).float()
    active = active - active.mean(0)
    projection = torch.randn(len(active), _SKETCH, generator=torch.Generator().manual_seed(seed))
    return F.normalize(active.T @ projection, dim=1).numpy()


def find_homes(vectors: npt.NDArray[np.float32], experts: int, seed: int) -> npt.NDArray[np.int64]:
    """Clusters [R, HOMES] of unit vectors [R, D]: different ones per row, and R / E rows per cluster and column."""
    count = len(vectors)
    start = np.random.RandomState(seed).permutation(count)[:experts]
    centroids = vectors[start]
    for _ in range(_ROUNDS):
        first = _balanced(vectors @ centroids.T)
        centroids = np.stack([vectors[first == e].mean(0) for e in range(experts)])
        centroids /= np.linalg.norm(centroids, axis=1, keepdims=True) + 1e-9
    likeness = vectors @ centroids.T
    homes = [first]
    while len(homes) < HOMES:
        likeness[np.arange(count), homes[-1]] = -10.0  # cosines are at least -1: nobody is sent to one home again
        homes.append(_balanced(likeness))
    return np.stack(homes, axis=1)


def _balanced(likeness: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The cluster of every row, all of equal size, with the largest sum of likeness [R, E]."""
    from scipy.optimize import linear_sum_assignment

    places = likeness.shape[0] // likeness.shape[1]
    _, column = linear_sum_assignment(np.repeat(-likeness, places, axis=1))
    return np.asarray(column // places, dtype=np.int64)
