"""What a router costs in quality and saves in reads: teacher-forced, on text that no router was tuned on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from remoe.cache_model import Prior, demand_contents, lru_contents, misses
from remoe.gates import Gates, Tape
from remoe.head import IGNORED, head_losses
from remoe.pools import OptimalPool
from remoe.routing import as_mask, expert_overlap
from remoe.texts import Sequences, batch
from remoe.tune import Teacher, last_hidden
from runtime.cache_prior import CachePrior

Tensors = dict[str, torch.Tensor]
Policy = Literal["lru", "gate"]
_ROWS = 8  # sequences at once: choosing with a prior goes token by token, whatever their number


@dataclass(frozen=True)
class Quality:
    """Against the stock router on the same tokens: `kl` in nats per token, `agreement` of the best next word; `eor`.

    `perplexity_error` is the standard error of perplexity / stock's, sequences being drawn at random: what the change
    of perplexity is known to.
    """

    perplexity: float
    perplexity_error: float
    kl: float
    agreement: float
    eor: float


@dataclass(frozen=True)
class Measured:
    """`misses` per token and layer for each number of slots (empty at the start of each document), and `optimum`: those
    of Belady's rule for the same routing. With a cache-prior the routing depends on the slots, so does quality.
    """

    quality: dict[int, Quality]
    misses: dict[int, float]
    optimum: dict[int, float]


class Chosen(NamedTuple):
    """A batch: `experts` [L, N, K] and `logits` [L, N, E] of every layer, `segments` [N] the tokens' documents."""

    experts: torch.Tensor
    logits: torch.Tensor
    segments: torch.Tensor


class Bench:
    """A model and the held-out text; stock outputs are computed once."""

    def __init__(self, gates: Gates, text: Sequences, slots: tuple[int, ...]) -> None:
        self.gates, self.text, self.slots = gates, text, slots
        self._teacher = Teacher()
        self._stock_ce: dict[int, float] = {}  # by sequence

    def measure(self, tensors: Tensors, prior: CachePrior | None = None, policy: Policy = "lru") -> Measured:
        """A router at every number of slots, which changes the routing itself where a prior is active."""
        self.gates.load(tensors)
        if prior is None:
            runs = dict.fromkeys(self.slots, self._run(None))
        else:
            runs = {c: self._run(Prior(prior, c, policy)) for c in self.slots}
        return Measured(
            {c: quality for c, (quality, _) in runs.items()},
            {c: self._misses(chosen, c, policy) for c, (_, chosen) in runs.items()},
            {c: self._optimum(chosen, c) for c, (_, chosen) in runs.items()},
        )

    def _run(self, prior: Prior | None) -> tuple[Quality, list[Chosen]]:
        """Quality, and what was chosen, per batch."""
        head = self.gates.model.get_output_embeddings().weight
        sums, chosen, overlaps = [], [], []
        with self.gates.installed(), torch.no_grad():
            for start in range(0, len(self.text), _ROWS):
                rows = list(range(start, min(start + _ROWS, len(self.text))))
                given = batch(self.text, rows)
                tape = Tape(given.segments.flatten(), prior)
                with self.gates.recorded(tape):
                    hidden = last_hidden(self.gates.model, given)
                taught = self._teacher.hidden(self.gates, self.text, rows, given)
                for row, ours, theirs, targets in zip(
                    rows, *(x.reshape(len(rows), -1, x.shape[-1]) for x in (hidden, taught)), given.targets, strict=True
                ):
                    if row not in self._stock_ce:
                        self._stock_ce[row] = head_losses(theirs, head, targets, None, 1.0, 0.0).ce
                    found, count = head_losses(ours, head, targets, theirs, 1.0, 1.0), int((targets != IGNORED).sum())
                    losses = (found.ce, found.kl, found.agreement, 1.0, found.ce - self._stock_ce[row])
                    sums.append(torch.tensor(losses, dtype=torch.float64) * count)
                experts = torch.stack(tape.experts)
                mask = as_mask(experts, self.gates.config.router.num_experts)
                overlaps.append(float(expert_overlap(mask, tape.segments).mean()) * len(rows))
                chosen.append(Chosen(experts, torch.stack(tape.logits), tape.segments))
            self.gates.forget()
        each = torch.stack(sums)
        ce, kl, agreement, _, more = (each.sum(0) / each[:, 3].sum()).tolist()
        error = mean_error(each[:, 4], each[:, 3]) * math.exp(more)
        return Quality(math.exp(ce), error, kl, agreement, sum(overlaps) / len(self.text)), chosen

    def _misses(self, chosen: list[Chosen], slots: int, policy: Policy) -> float:
        return sum(self._missed(part, slots, policy) for part in chosen) / self._steps(chosen)

    def _missed(self, part: Chosen, slots: int, policy: Policy) -> int:
        rules, (experts, logits, segments) = self.gates.config.router, part
        if policy == "lru":
            return int(misses(experts, lru_contents(experts, segments, rules.num_experts, slots)).sum())
        layers = zip(experts, logits, strict=True)
        return sum(int(misses(e, demand_contents(rules, z, e, segments, slots)).sum()) for e, z in layers)

    def _optimum(self, chosen: list[Chosen], slots: int) -> float:
        total = 0
        for part in chosen:
            for layer in part.experts:
                for steps in _documents(layer, part.segments):
                    pool = OptimalPool(slots, steps)
                    total += sum(pool.request(step) for step in steps)
        return total / self._steps(chosen)

    @staticmethod
    def _steps(chosen: list[Chosen]) -> int:
        return sum(part.experts.shape[0] * part.experts.shape[1] for part in chosen)


def mean_error(sums: torch.Tensor, counts: torch.Tensor) -> float:
    """Standard error of sum / count over all, from the sums and counts [R] of parts drawn at random."""
    left = sums - sums.sum() / counts.sum() * counts
    return float(left.norm() / counts.sum())


def _documents(layer: torch.Tensor, segments: torch.Tensor) -> list[Any]:
    """The steps of each document: lists of experts, by token."""
    sizes = torch.unique_consecutive(segments, return_counts=True)[1].tolist()
    return [part.tolist() for part in layer.split(sizes)]
