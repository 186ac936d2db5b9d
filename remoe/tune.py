"""Router tuning with the model in memory: the gates learn, all else is frozen.

    step -> for each micro-batch: forward with a tape on the gates, terms, backward -> average, clip, AdamW

`tune` may be called many times with one model: gates are put in and taken out again, `Teacher` keeps what the stock
model said. Everything is deterministic: the sequences of step n follow from the seed and n alone.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe.gates import Gates, Tape
from remoe.head import IGNORED, head_losses
from remoe.objective import combine, layer_terms, routing_numbers
from remoe.texts import Batch, Sequences, batch
from remoe.tune_options import TuneOptions
from remoe.tune_state import Identity, load_state, save_state
from remoe.workers import Workers
from runtime.config import ModelConfig
from runtime.errors import EdgeError, UsageError
from runtime.router_file import gates_sha256

Numbers = dict[str, float]


@dataclass(frozen=True)
class Tuned:
    """What a run gives: the tensors of a router file, those before tuning, the numbers of every step that ran in this
    process, and the last step.
    """

    tensors: dict[str, Tensor]
    stock: dict[str, Tensor]
    history: list[Numbers]
    steps: int


class Teacher:
    """The stock model's last hidden states [B * S, H] of packed sequences, kept once computed if `keep`."""

    def __init__(self, keep: bool = True) -> None:
        self._keep = keep
        self._known: dict[tuple[str, int], Tensor] = {}

    def hidden(self, gates: Gates, sequences: Sequences, rows: list[int], given: Batch) -> Tensor:
        """For the rows of `sequences` that make up the batch `given`."""
        keys = [(sequences.sha256, row) for row in rows]
        if all(key in self._known for key in keys):
            return torch.cat([self._known[key] for key in keys]).to(given.ids.device)
        with torch.no_grad(), gates.as_stock():
            states = last_hidden(gates.model, given)
        if self._keep:
            for key, part in zip(keys, states.chunk(len(rows)), strict=True):
                self._known[key] = part.cpu().clone()
        return states


def tune(
    model: Any,
    config: ModelConfig,
    sequences: Sequences,
    options: TuneOptions,
    *,
    workers: Workers | None = None,
    teacher: Teacher | None = None,
    start: dict[str, Tensor] | None = None,
    state: Path | None = None,
    on_step: Callable[[Numbers], None] = lambda numbers: None,
) -> Tuned:
    """Tune the gates of a transformers causal language model, which lies on the device of `workers` and is not changed.

    `start` are gates to begin with in place of the stock ones; trust stays with the stock ones. `state` is a file that
    keeps an unfinished run: where it exists the run goes on from there, bit for bit. `on_step` is told of every step.
    Raises UsageError for settings that cannot be, EdgeError when the loss is no number, KeyboardInterrupt after the
    step in which SIGINT or SIGTERM came, with the state on disk.
    """
    workers = workers or Workers(str(next(model.parameters()).device))
    options.check(config, workers.count)
    gates = Gates(model, config)
    identity = Identity(options.digest(), sequences.sha256, gates_sha256(gates.tensors(stock=True)), workers.count)
    if start is not None:
        gates.load(start)
        identity = Identity(identity.options_sha256, identity.data_sha256, gates_sha256(start), workers.count)
    run = _Run(gates, sequences, options, workers, teacher or Teacher())
    first = 1
    if state is not None and state.exists():
        first = load_state(state, gates.parameters(), run.optimizer, identity) + 1
    history = []
    with gates.installed(), _train_mode(model, options), stop_signals() as stop:
        for step in range(first, options.steps + 1):
            numbers = run.step(step)
            history.append(numbers)
            on_step(numbers)
            last = step == options.steps
            if state is not None and workers.first and (stop.is_set() or (not last and step % options.save_every == 0)):
                save_state(state, step, gates.parameters(), run.optimizer, identity)
            if stop.is_set() and not last:
                raise KeyboardInterrupt
    return Tuned(gates.tensors(), gates.tensors(stock=True), history, options.steps)


def last_hidden(model: Any, given: Batch) -> Tensor:
    """Hidden states after the last norm, [B * S, H]; attention stays within documents."""
    output = model.model(input_ids=given.ids, position_ids=given.positions, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


def rows_of_step(step: int, options: TuneOptions, count: int) -> list[int]:
    """The sequences of a step (counted from 1) out of `count`: every epoch in a new order."""
    rows = []
    for place in range((step - 1) * options.batch, step * options.batch):
        epoch, at = divmod(place, count)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        rows.append(int(torch.randperm(count, generator=generator)[at]))
    return rows


class _Run:
    """One run's gates, optimizer and data."""

    def __init__(
        self, gates: Gates, sequences: Sequences, options: TuneOptions, workers: Workers, teacher: Teacher
    ) -> None:
        self.gates, self.sequences, self.options, self.workers = gates, sequences, options, workers
        self._teacher = teacher
        self._router = gates.config.router
        self._prior = options.objective.cache_prior(self._router)
        self.optimizer = torch.optim.AdamW(gates.parameters(), lr=options.lr, weight_decay=options.weight_decay)

    def step(self, step: int) -> Numbers:
        """One update of the gates; the numbers are means over all sequences of the step."""
        begin, options = time.perf_counter(), self.options
        rows = rows_of_step(step, options, len(self.sequences))[self.workers.rank :: self.workers.count]
        parts = [rows[i : i + options.micro_batch] for i in range(0, len(rows), options.micro_batch)]
        self.optimizer.zero_grad()
        total: dict[str, float] = {}
        for number, part in enumerate(parts):
            place = (step * 4096 + number) * self.workers.count + self.workers.rank
            for name, value in self._backward(part, step, len(parts), place).items():
                total[name] = total.get(name, 0.0) + value / len(parts)
        total = self._shared(total)
        if not math.isfinite(total["loss"]):
            raise EdgeError(f"step {step}: the loss is {total['loss']}: {_cure(step)}")
        norm = torch.nn.utils.clip_grad_norm_(self.gates.parameters(), options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate(step)
        self.optimizer.step()
        seconds = time.perf_counter() - begin
        tokens = options.batch * self.sequences.ids.shape[1]
        return {
            "step": step,
            **total,
            **({"ppl": math.exp(min(total["ce"], 700.0))} if "ce" in total else {}),
            "alpha": options.objective.alpha(step),
            "lr": options.learning_rate(step),
            "grad_norm": float(norm),
            "tokens": step * tokens,
            "seconds": round(seconds, 4),
            "tokens_per_s": round(tokens / seconds, 1),
        }

    def _backward(self, rows: list[int], step: int, parts: int, place: int) -> Numbers:
        """Gradients of one micro-batch; `place` seeds the draw of tokens for the head."""
        gates, objective = self.gates, self.options.objective
        given = batch(self.sequences, rows, self.workers.device)
        tape = Tape(given.segments.flatten(), self._prior, keep_hidden=not objective.hidden_gradient)
        through_model = objective.needs_model or objective.hidden_gradient
        with gates.recorded(tape), torch.set_grad_enabled(through_model):
            hidden = last_hidden(gates.model, given)
        routed = gates.routed(tape, objective.hidden_gradient)
        terms = layer_terms(objective, self._router, routed)
        numbers = {name: float(value.detach().mean()) for name, value in terms.items()}
        loss = combine(objective, terms, objective.alpha(step)) if terms else torch.zeros((), device=hidden.device)
        if objective.needs_model:
            head = self._head(hidden, given, rows, place)
            loss = loss + head.total
            numbers["ce"] = head.ce
            if objective.lm_kl:
                numbers |= {"lm_kl": head.kl, "agreement": head.agreement}
        (loss / parts).backward()  # type: ignore[no-untyped-call]
        gates.forget()
        slots = objective.slots(self._router)
        return {"loss": float(loss.detach()), **numbers, **routing_numbers(self._router, routed, slots)}

    def _head(self, hidden: Tensor, given: Batch, rows: list[int], place: int) -> Any:
        objective, config = self.options.objective, self.gates.config
        targets = given.targets.flatten()
        if self.options.head_share < 1:
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + place)
            left_out = torch.rand(len(targets), generator=generator) >= self.options.head_share
            targets = targets.masked_fill(left_out.to(targets.device), IGNORED)
        taught = self._teacher.hidden(self.gates, self.sequences, rows, given) if objective.lm_kl else None
        weight = self.gates.model.get_output_embeddings().weight
        return head_losses(hidden, weight, targets, taught, objective.ce, objective.lm_kl, config.logits_scale)

    def _shared(self, numbers: Numbers) -> Numbers:
        """Gradients and numbers averaged over all processes."""
        if self.workers.count == 1:
            return numbers
        values = torch.tensor([numbers[n] for n in sorted(numbers)], device=self.workers.device)
        gradients = [p.grad for p in self.gates.parameters() if p.grad is not None]
        self.workers.average([*gradients, values])
        return dict(zip(sorted(numbers), values.tolist(), strict=True))


@contextmanager
def _train_mode(model: Any, options: TuneOptions) -> Iterator[None]:
    """Without dropout; with gradient checkpointing where wanted, which transformers does in training mode alone."""
    was_training = model.training
    checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    active = [n for n, m in model.named_modules() if getattr(m, "attention_dropout", 0) or getattr(m, "p", 0)]
    if options.gradient_checkpointing and active:
        raise UsageError(f"the model has dropout ({active[0]}), which tuning must not have: set it to 0 in config.json")
    model.train(options.gradient_checkpointing)
    if options.gradient_checkpointing and not checkpointed:
        _checkpointing(model, "enable", {"use_reentrant": False})
    try:
        yield
    finally:
        if options.gradient_checkpointing and not checkpointed:
            _checkpointing(model, "disable")
        model.train(was_training)


def _checkpointing(model: Any, verb: str, *arguments: Any) -> None:
    newer, older = f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"  # renamed in transformers 5
    getattr(model, newer if hasattr(model, newer) else older)(*arguments)


def _cure(step: int) -> str:
    if step == 1:  # nothing was changed yet
        return "a weight of the checkpoint is no number (edge export names it), or one of the objective is too large"
    return "lower the learning rate or the largest weight"


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM set, so that a step is finished first; the second one acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    known = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    terminated = False

    def note(number: int, frame: object) -> None:
        nonlocal terminated
        stop.set()
        terminated = terminated or number == signal.SIGTERM
        signal.signal(number, known[signal.Signals(number)])

    def restore() -> None:
        for number, handler in known.items():
            signal.signal(number, handler)

    for number in known:
        signal.signal(number, note)
    try:
        yield stop
    except KeyboardInterrupt:
        restore()
        handler = known[signal.SIGTERM]
        if terminated and callable(handler):
            handler(signal.SIGTERM, None)  # held back until the step was done: the program's exit code tells them apart
        raise
    finally:
        restore()
