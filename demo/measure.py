"""Perplexity and routing of a checkpoint in transformers, fp32, teacher-forced.

Shapes: R rows of text, T predicted tokens per row, L layers with experts, E experts, K chosen ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BATCH = 4  # rows at once: 4 x 512 logits of 49,152 words are 400 MB


@dataclass(frozen=True)
class Routing:
    """`overlap` [L]: EOR, the mean share of a token's K experts that the token before it chose, neighbours within a
    row; `loads` [L, E]: how often each expert was chosen; `top_k`: K."""

    overlap: tuple[float, ...]
    loads: tuple[tuple[int, ...], ...]
    top_k: int

    @property
    def chance(self) -> float:
        """EOR of independent, even choices: K / E."""
        return self.top_k / len(self.loads[0])

    @property
    def mean_overlap(self) -> float:
        """EOR over layers."""
        return sum(self.overlap) / len(self.overlap)


@dataclass(frozen=True)
class Score:
    """What a model made of the rows: nats per predicted token, how many of them, and its routing if it routes."""

    nats_per_token: float
    tokens: int
    routing: Routing | None

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy."""
        return math.exp(self.nats_per_token)


def text_rows(tokenizer: Tokenizer, documents: Sequence[str], length: int, tokens: int) -> Tensor:
    """The first `length` tokens of each document, one after the other with END between them, in rows: int64 [R, T + 1].

    T = `length`; every token but the first of a row is predicted. Rows share no prediction. At most `tokens` of them.
    Raises UsageError when the documents do not fill one row.
    """
    end = tokenizer.token_to_id("<|endoftext|>")
    if end is None:
        raise UsageError("the model's tokenizer has no <|endoftext|> to put between documents")
    ids: list[int] = []
    for document in documents:
        ids += [end, *tokenizer.encode(document).ids[:length]]
        if len(ids) > tokens:
            break
    rows = min(len(ids) - 1, tokens) // length
    if rows == 0:
        raise UsageError(f"{len(ids)} tokens of text do not fill a row of {length}: take a smaller --length")
    return torch.tensor(ids[: rows * length + 1]).unfold(0, length + 1, length)


def routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The top-k routers of a transformers model, in layer order (none: a dense model)."""
    return [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]


@torch.no_grad()
def score(model: torch.nn.Module, rows: Tensor) -> Score:
    """Cross-entropy of rows [R, T + 1] and, for a mixture, which experts their tokens chose."""
    gates = routers(model)
    chosen: list[list[Tensor]] = [[] for _ in gates]
    handles = [
        gate.register_forward_hook(lambda _module, _args, out, store=store: store.append(out[-1]))
        for gate, store in zip(gates, chosen, strict=True)
    ]
    total = 0.0
    try:
        for part in rows.split(_BATCH):
            logits = model(part[:, :-1], use_cache=False).logits
            total += F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    finally:
        for handle in handles:
            handle.remove()
    tokens = len(rows) * (rows.shape[1] - 1)
    routing = _routing([torch.cat(parts).view(len(rows), rows.shape[1] - 1, -1) for parts in chosen], gates)
    return Score(total / tokens, tokens, routing)


def _routing(chosen: list[Tensor], gates: list[Any]) -> Routing | None:
    """chosen: per layer [R, T, K]."""
    if not chosen:
        return None
    overlap = [(c[:, 1:, :, None] == c[:, :-1, None, :]).any(-1).float().mean().item() for c in chosen]
    loads = [
        tuple(torch.bincount(c.flatten(), minlength=len(g.weight)).tolist()) for c, g in zip(chosen, gates, strict=True)
    ]
    return Routing(tuple(overlap), tuple(loads), chosen[0].shape[-1])


@contextmanager
def with_top_k(model: torch.nn.Module, top_k: int) -> Iterator[None]:
    """The model takes `top_k` experts per token inside."""
    gates: list[Any] = routers(model)
    experts = min(len(gate.weight) for gate in gates)
    if not 1 <= top_k <= experts:
        raise UsageError(f"top-k {top_k}: the model has {experts} experts per layer")
    stock = [gate.top_k for gate in gates]
    try:
        for gate in gates:
            gate.top_k = top_k
        yield
    finally:
        for gate, old in zip(gates, stock, strict=True):
            gate.top_k = old


@contextmanager
def with_random_routers(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Every router is replaced by normal noise whose rows have the trained rows' lengths."""
    gates: list[Any] = routers(model)
    stock = [gate.weight.data for gate in gates]
    generator = torch.Generator().manual_seed(seed)
    try:
        for gate, weight in zip(gates, stock, strict=True):
            noise = torch.randn(weight.shape, generator=generator)
            noise *= weight.float().norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
            gate.weight.data = noise.to(weight.dtype)
        yield
    finally:
        for gate, weight in zip(gates, stock, strict=True):
            gate.weight.data = weight
