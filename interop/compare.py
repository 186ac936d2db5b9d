"""What an engine did against what the reference did, in figures.

Arithmetic in another order moves fp32 results by about 1e-6 of their size. Where two experts or two tokens were that
close, either choice is right, and after another expert everything behind it is a little different. Hence shares with a
floor, and a margin for answers, which may part only where the reference itself was undecided.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from interop.observed import Array, Observed


@dataclass(frozen=True)
class Limits:
    """What is still agreement. Scores are log-probabilities in nats.

    `routing`, `best`: least share of equal choices and of equal best tokens. `score`: largest mean distance.
    `answer_margin`: greedy answers may part where the reference's two best tokens were that close.
    `difference`: by so much the choices are nearer to the tuned router's than to the stock one's.
    """

    routing: float = 0.999
    best: float = 0.999
    score: float = 1e-3
    answer_margin: float = 1e-2
    difference: float = 0.05


FP32 = Limits()
# Weights and activations rounded to 8 bits of mantissa: other experts are chosen wherever two were close, and greedy
# answers part sooner or later.
NARROW = Limits(routing=0.9, best=0.85, score=0.1, answer_margin=np.inf)


@dataclass(frozen=True)
class Agreement:
    """Figures of one comparison. None: the engine was not asked, or does not tell."""

    choices: int | None = None  # tokens x layers x experts per token
    routing: float | None = None  # share of equal choices
    routing_stock: float | None = None  # the same against the stock router
    mean_score_gap: float | None = None
    largest_score_gap: float | None = None
    best: float | None = None  # share of equal best next tokens
    answer_tokens: int | None = None
    answers: float | None = None  # share of answered tokens before the first that differs
    answers_stock: float | None = None  # the same against answers with the stock router
    answers_wrong: int | None = None  # answers that part where the reference was decided

    def figures(self) -> dict[str, float | int]:
        """What is known, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def agree(reference: Observed, stock: Observed, found: Observed, limits: Limits) -> Agreement:
    """Compare. `stock`: the reference with the stock router. Raises ValueError when shapes differ."""
    values: dict[str, Any] = {}
    if found.experts:
        values["choices"] = sum(a.size for a in found.experts)
        values["routing"] = _routing(reference, found)
        values["routing_stock"] = _routing(stock, found)
    if found.scores:
        gaps = np.concatenate([np.abs(a - b) for a, b in _pairs(reference.scores, found.scores)])
        values["mean_score_gap"], values["largest_score_gap"] = float(gaps.mean()), float(gaps.max())
    if found.best:
        same = np.concatenate([a == b for a, b in _pairs(reference.best, found.best)])
        values["best"] = float(same.mean())
    if found.answers:
        values["answer_tokens"] = sum(a.size for a in found.answers)
        values["answers"], values["answers_wrong"] = _answers(reference, found, limits.answer_margin)
        values["answers_stock"], _ = _answers(stock, found, np.inf)
    return Agreement(**values)


def complaints(found: Agreement, limits: Limits) -> list[str]:
    """Why this is no agreement; empty when it is one."""
    said = []
    if found.routing is not None and found.routing_stock is not None:
        if found.routing < limits.routing:
            said.append(f"{found.routing:.4f} of the choices equal, wanted {limits.routing}")
        if found.routing - found.routing_stock < limits.difference:
            said.append(
                f"as near to the stock router ({found.routing_stock:.4f}) as to the tuned ({found.routing:.4f})"
            )
    if found.best is not None and found.best < limits.best:
        said.append(f"{found.best:.4f} of the best tokens equal, wanted {limits.best}")
    if found.mean_score_gap is not None and not found.mean_score_gap <= limits.score:
        said.append(f"log-probabilities {found.mean_score_gap:.2g} apart on average, allowed {limits.score}")
    if found.answers_wrong:
        said.append(f"{found.answers_wrong} answers part where nothing was close")
    return said


def _pairs(reference: list[Array], found: list[Array]) -> list[tuple[Array, Array]]:
    if [a.shape for a in reference] != [b.shape for b in found]:
        raise ValueError(f"shapes {[b.shape for b in found]}, the reference has {[a.shape for a in reference]}")
    return list(zip(reference, found, strict=True))


def _routing(reference: Observed, found: Observed) -> float:
    """Share of the found experts [T, L, K] that the reference chose for the same token and layer."""
    hits = [(a[..., :, None] == b[..., None, :]).any(-2) for a, b in _pairs(reference.experts, found.experts)]
    return float(np.concatenate([hit.ravel() for hit in hits]).mean())


def _answers(reference: Observed, found: Observed, margin: float) -> tuple[float, int]:
    """Share of tokens before the first that differs, and answers that part where the reference's lead was larger."""
    kept = wrong = total = 0
    for (a, b), lead in zip(_pairs(reference.answers, found.answers), reference.answer_margins, strict=True):
        apart = np.flatnonzero(a != b)
        first = int(apart[0]) if len(apart) else len(a)
        kept, total = kept + first, total + len(a)
        wrong += bool(len(apart) and lead[first] > margin)
    return kept / total, wrong
