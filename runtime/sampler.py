"""From logits to the next token id. Shapes: V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.errors import EdgeError, UsageError

_MAX_SEED = (1 << 63) - 1
_FEW = 1024  # sorting a whole vocabulary takes 20 ms; what top-p keeps is nearly always among this many
_LEAST_TEMPERATURE = 1e-30  # below it nothing changes, and fp32 ends


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
        # Kept from token to token: fresh memory of this size comes page by page from the kernel, which takes longer.
        self._weights, self._sums = torch.empty(0), torch.empty(0, dtype=torch.float64)

    def choose(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """The next token id from logits [V] (fp32), given all ids so far, prompt included.

        Raises EdgeError when the logits are no numbers: an overflow in a low precision, or damaged weights.
        """
        scores = self._penalised(logits, history)
        best = int(scores.numpy().argmax())  # numpy's: one pass of vector code; the first of equal ones, or of NaNs
        if not math.isfinite(scores[best]):
            raise EdgeError(
                f"the model's logits contain {scores[best].item()}: its values left the range of the compute dtype\n"
                "  run again with --dtype fp32, or check the weights: edge verify BUNDLE"
            )
        if self.options.temperature == 0:
            return best
        ids, weights = self._candidates(scores, float(scores[best]))
        at = self._draw(weights)
        return at if ids is None else int(ids[at])

    def distribution(self, logits: torch.Tensor, history: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What `choose` draws from, for a temperature above 0: ids [n] and their probabilities [n] fp64."""
        scores = self._penalised(logits, history)
        ids, weights = self._candidates(scores, float(scores.max()))
        weights = weights.double()
        return torch.arange(len(scores)) if ids is None else ids, weights / weights.sum()

    def _penalised(self, logits: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
        scores = logits.detach().to("cpu", torch.float32)
        penalty = self.options.repetition_penalty
        if penalty == 1 or not len(history):
            return scores
        seen = torch.as_tensor(history, dtype=torch.long)
        values = scores[seen]
        # A negative logit is multiplied, for a division would raise it. A token seen twice is penalised once.
        return scores.scatter(0, seen, torch.where(values < 0, values * penalty, values / penalty))

    def _candidates(self, scores: torch.Tensor, best: float) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Ids that may be drawn (None: all) and their weights, fp32, 1 for the best token.

        A weight is e^((score - best) / temperature), off by at most 1e-5 of itself where it is above 1e-30.
        """
        ids = _largest(scores, self.options.top_k) if self.options.top_k else None
        # The maximum is taken off before the division, so that a tiny temperature cannot overflow.
        scores = scores if ids is None else scores[ids]
        weights = torch.sub(scores, best, out=self._weights.resize_(len(scores)))
        weights = weights.div_(max(self.options.temperature, _LEAST_TEMPERATURE)).exp_()
        if self.options.top_p < 1:
            kept = _nucleus(weights, self.options.top_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        return ids, weights

    def _draw(self, weights: torch.Tensor) -> int:
        reached = torch.cumsum(weights, 0, dtype=torch.float64, out=self._sums.resize_(len(weights)))
        point = torch.rand((), generator=self._random, dtype=torch.float64) * reached[-1]
        # The first sum above the point: a token of probability 0 adds nothing and is never it.
        at = int(torch.searchsorted(reached, point, right=True))
        return at if at < len(weights) else int(weights.argmax())  # the product may round up to the end


def _nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """Positions of the fewest largest weights whose share reaches `top_p`, at least one; by falling weight."""
    total = float(weights.sum(dtype=torch.float64))
    # All weights below this one together are less than what top-p leaves out.
    among = (weights >= 0.999 * total * (1 - top_p) / len(weights)).nonzero().flatten()
    for count in (_FEW, 8 * _FEW, len(among)):
        order = among[_largest(weights[among], count)]
        chosen = weights[order]
        before = chosen.cumsum(0, dtype=torch.float64) - chosen
        if before[-1] >= top_p * total:
            break
    return order[: max(1, int((before < top_p * total).sum()))]


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the `count` largest values, falling; equal values stay in order, whatever topk makes of them."""
    if count >= len(values):
        return torch.sort(values, descending=True, stable=True).indices
    smallest = torch.topk(values, count).values[-1]
    among = (values >= smallest).nonzero().flatten()
    return among[torch.sort(values[among], descending=True, stable=True).indices[:count]]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
