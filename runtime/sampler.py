"""From logits to the next token id. Shapes: V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.errors import EdgeError, UsageError

_MAX_SEED = (1 << 63) - 1
_FEW = 1024  # sorting a whole vocabulary takes 20 ms; what top-p keeps is nearly always among this many


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; steps in this order: repetition penalty, temperature, top-k, top-p, draw.

    `temperature` 0 takes the best token always (top-k, top-p and seed then play no part). `top_k` 0 and `top_p` 1
    switch these limits off. `repetition_penalty` above 1 makes tokens of the prompt and the answer less likely.
    Raises UsageError naming the value.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # Written so that NaN fails every rule.
        rules = {
            "temperature": (math.isfinite(self.temperature) and self.temperature >= 0, "a number from 0 (greedy) up"),
            "top_k": (_is_int(self.top_k) and self.top_k >= 0, "a whole number from 0 (no limit) up"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (no limit)"),
            "repetition_penalty": (
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "a number above 0 (1 changes nothing)",
            ),
            "seed": (_is_int(self.seed) and 0 <= self.seed <= _MAX_SEED, f"a whole number from 0 to {_MAX_SEED}"),
        }
        for name, (holds, wanted) in rules.items():
            if not holds:
                raise UsageError(f"{name} is {getattr(self, name)!r}, it must be {wanted}")


class Sampler:
    """Chooses tokens. Owns its random generator, so equal seeds give equal draws whatever else uses torch."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._random = torch.Generator(device="cpu").manual_seed(options.seed)

    def choose(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """The next token id from logits [V] (fp32), given all ids so far, prompt included.

        Raises EdgeError when the logits are no numbers: an overflow in a low precision, or damaged weights.
        """
        scores = self._penalised(logits, history)
        best = scores.max()
        if not torch.isfinite(best):
            raise EdgeError(
                f"the model's logits contain {best.item()}: its values left the range of the compute dtype\n"
                "  run again with --dtype fp32, or check the weights: edge verify BUNDLE"
            )
        if self.options.temperature == 0:
            return int(torch.argmax(scores))  # the first one, where several are equal
        ids, probabilities = self._candidates(scores)
        return self._draw(ids, probabilities)

    def distribution(self, logits: torch.Tensor, history: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What `choose` draws from, for a temperature above 0: ids [n] and their probabilities [n]."""
        return self._candidates(self._penalised(logits, history))

    def _penalised(self, logits: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
        scores = logits.detach().to("cpu", torch.float32)
        penalty = self.options.repetition_penalty
        if penalty == 1 or not len(history):
            return scores
        seen = torch.as_tensor(history, dtype=torch.long)
        values = scores[seen]
        # A negative logit is multiplied, for a division would raise it. A token seen twice is penalised once.
        return scores.scatter(0, seen, torch.where(values < 0, values * penalty, values / penalty))

    def _candidates(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top_k, top_p = self.options.top_k, self.options.top_p
        ids = _largest(scores, top_k) if top_k else torch.arange(len(scores))
        # The maximum is taken off before the division, so that a tiny temperature cannot overflow.
        weights = ((scores[ids].double() - scores.max().double()) / self.options.temperature).exp()
        probabilities = weights / weights.sum()
        if top_p < 1:
            kept = _nucleus(probabilities, top_p)
            ids, probabilities = ids[kept], probabilities[kept] / probabilities[kept].sum()
        return ids, probabilities

    def _draw(self, ids: torch.Tensor, probabilities: torch.Tensor) -> int:
        reached = probabilities.cumsum(0)
        point = torch.rand((), generator=self._random, dtype=torch.float64) * reached[-1]
        # The first sum above the point: a token of probability 0 adds nothing and is never it.
        at = int(torch.searchsorted(reached, point, right=True))
        return int(ids[at if at < len(ids) else int(probabilities.argmax())])  # the product may round up to the end


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Positions of the fewest largest probabilities whose sum reaches `top_p`, at least one; by falling probability."""
    order = _largest(probabilities, _FEW)
    before = probabilities[order].cumsum(0) - probabilities[order]
    if before[-1] < top_p and len(order) < len(probabilities):
        order = _largest(probabilities, len(probabilities))
        before = probabilities[order].cumsum(0) - probabilities[order]
    return order[: max(1, int((before < top_p).sum()))]


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the `count` largest values, falling; equal values stay in order, whatever topk makes of them."""
    if count >= len(values):
        return torch.sort(values, descending=True, stable=True).indices
    smallest = torch.topk(values, count).values[-1]
    among = (values >= smallest).nonzero().flatten()
    return among[torch.sort(values[among], descending=True, stable=True).indices[:count]]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
