"""Second stage: all layers together learn the dense model's next-token distribution (knowledge distillation)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from demo.distill.network import Network
from demo.distill.student import Student, dense_pass, divergence

_FIRST = 4  # positions at the start of a row that are not compared: too little text to say anything


@dataclass(frozen=True)
class DistilOptions:
    """`minutes` of wall clock end the training, whose learning rate has fallen to 0 by then."""

    minutes: float = 60.0
    rows: int = 2
    positions: int = 96  # per row, at which next-token distributions are compared: the head is a quarter of the work
    gate_rate: float = 1e-3
    change_rate: float = 1e-3
    hidden_weight: float = 0.25
    balance_weight: float = 1.0  # of the mean over layers
    warm_up: int = 10
    keep: tuple[int, ...] = (5, 11, 17, 23)


@dataclass(frozen=True)
class Step:
    """One line of the training log."""

    step: int
    tokens: int
    seconds: float
    kl: float
    hidden: float
    balance: float


def distil(student: Student, texts: torch.Tensor, options: DistilOptions, log: Path, save: Callable[[], None]) -> int:
    """Train on rows [N, S] in a random order, again when they are used up. Returns the number of tokens seen.

    Appends a JSON line per step to `log`; calls `save` every five minutes and at the end.
    """
    changes = [p for name, p in student.named_parameters() if not name.endswith(("gate", "log_scale"))]
    gates = [p for name, p in student.named_parameters() if name.endswith(("gate", "log_scale"))]
    groups = [{"params": gates, "rate": options.gate_rate}, {"params": changes, "rate": options.change_rate}]
    optimizer = torch.optim.Adam(groups, lr=options.gate_rate, betas=(0.9, 0.98))
    started = saved = time.monotonic()
    tokens, step = 0, 0
    teacher = _Teacher(student.network, texts, options.keep)
    with log.open("a") as file, closing(teacher.ahead(_batches(len(texts), options.rows))) as batches:
        while (done := (time.monotonic() - started) / (60 * options.minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * min(1, (step + 1) / options.warm_up) * (1 - done)
            chosen, wanted = next(batches)
            optimizer.zero_grad()
            terms = _losses(student, texts[chosen], wanted, options)
            (terms[0] + options.hidden_weight * terms[1] + options.balance_weight * terms[2]).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            step, tokens = step + 1, tokens + len(chosen) * texts.shape[1]
            line = Step(step, tokens, round(time.monotonic() - started, 1), *(round(t.item(), 4) for t in terms))
            file.write(json.dumps(asdict(line)) + "\n")
            file.flush()
            if time.monotonic() - saved > 300:
                save()
                saved = time.monotonic()
    save()
    return tokens


def _batches(total: int, size: int) -> Iterator[list[int]]:
    """Numbers of rows in a random order, in another one when they are used up; for ever."""
    while True:
        order = torch.randperm(total).tolist()
        yield from (order[at : at + size] for at in range(0, total - size + 1, size))


class _Teacher:
    """What the dense model says of every row, computed once and kept in fp16: it is a quarter of the work of a step."""

    def __init__(self, network: Network, texts: torch.Tensor, keep: tuple[int, ...]) -> None:
        self._network, self._texts, self._keep = network, texts, keep
        self._known: dict[int, torch.Tensor] = {}

    def ahead(self, batches: Iterator[list[int]]) -> Generator[tuple[list[int], list[torch.Tensor]]]:
        """Batches with their states; those of the next one are computed meanwhile, on a second core if there is one."""
        with ThreadPoolExecutor(1) as pool:
            chosen = next(batches)
            states = pool.submit(self.hidden, chosen)
            for following in batches:
                ready, states = states.result(), pool.submit(self.hidden, following)
                yield chosen, ready
                chosen = following

    def hidden(self, rows: list[int]) -> list[torch.Tensor]:
        """`Pass.hidden` of the rows with these numbers, [len(rows), S, H] each."""
        for row in rows:
            if row not in self._known:
                states = dense_pass(self._network, self._texts[row][None], self._keep)
                self._known[row] = torch.cat(states).half()
        return list(torch.stack([self._known[row] for row in rows], dim=1).float())


def _losses(
    student: Student, rows: torch.Tensor, wanted: list[torch.Tensor], options: DistilOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL of the next token, relative error of the residual stream, balance term: its mean over the layers)."""
    found = student(rows, options.keep)
    pairs = [(a[:, _FIRST:], b[:, _FIRST:]) for a, b in zip(found.hidden, wanted, strict=True)]
    errors = [((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in pairs[:-1]]
    chosen = torch.randperm(rows.shape[1] - _FIRST)[: options.positions]
    last, target = (t[:, chosen].flatten(0, 1) for t in pairs[-1])
    kl = divergence(student.network, last, target)
    balance = torch.stack([routed.balance for routed in found.routed]).mean()
    return kl, torch.stack(errors).sum(), balance
