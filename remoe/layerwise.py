"""Tuning from recorded router inputs: layer by layer, without the model.

Locality, trust and boundary terms need only h_t, the input of a gate. So gates are tuned from a trace (`edge trace
--hidden`), on the board that recorded it, in the memory of one layer's inputs. What later layers would see of the
change is left out: h_t stays as recorded, so small steps and a trust term are advised.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remoe.cache_model import choose_with_prior
from remoe.objective import Objective, Routed, combine, layer_terms, routing_numbers
from remoe.routing import choose
from remoe.tune import Numbers, Tuned, stop_signals
from remoe.tune_options import TuneOptions
from remoe.tune_state import Identity, done_of_state, load_state, save_state, step_of_state
from runtime.config import RouterConfig
from runtime.errors import EdgeError, UsageError
from runtime.router_file import gates_sha256

if TYPE_CHECKING:
    from collections.abc import Sequence

    from remoe.trace import Trace


@dataclass(frozen=True)
class Inputs:
    """Recorded inputs of the gates: hidden [N, L, H] per trace (fp16), documents [N] per trace, the layers' numbers."""

    hidden: list[Any]
    segments: list[Tensor]
    layers: tuple[int, ...]
    router: RouterConfig
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens of all traces."""
        return sum(len(s) for s in self.segments)


def inputs_of(traces: Sequence[Trace], gates_sha256: str, where: Sequence[str]) -> Inputs:
    """What the traces recorded. Raises UsageError for one without hidden states, or of another model's gates."""
    digest = hashlib.sha256()
    segments = []
    for trace, name in zip(traces, where, strict=True):
        if trace.hidden is None:
            raise UsageError(f"{name}: has no router inputs: record it with `edge trace BUNDLE --hidden`")
        if trace.info.gates_sha256 != gates_sha256:
            raise UsageError(
                f"{name}: recorded from {trace.info.model!r} (gates {trace.info.gates_sha256[:12]}), but the stock "
                f"gates given are {gates_sha256[:12]}: name the bundle that the trace was recorded from"
            )
        digest.update(trace.tokens.tobytes() + trace.requests.tobytes() + trace.experts.tobytes())
        segments.append(torch.from_numpy(trace.requests.astype("int64")))
    info = traces[0].info
    return Inputs([t.hidden for t in traces], segments, info.moe_layers, info.rules, digest.hexdigest())


def tune_layers(
    inputs: Inputs,
    stock: dict[str, Tensor],
    options: TuneOptions,
    window: int = 512,
    on_step: Callable[[Numbers], None] = lambda numbers: None,
    state: Path | None = None,
) -> Tuned:
    """Tune every layer's gate for `options.steps` steps of `options.batch` windows of consecutive tokens.

    `stock` are the tensors of the base router. Layers are tuned one after another; the numbers given to `on_step` are
    those of one layer, "step" counts over all of them. `state` is a file that keeps an unfinished run: where it exists
    the run goes on from there, bit for bit. Raises UsageError for an objective that needs the model, EdgeError when the
    loss is no number, KeyboardInterrupt after the step in which SIGINT or SIGTERM came, with the state on disk.
    """
    objective = options.objective
    if objective.needs_model:
        raise UsageError("a trace has no language model: set --ce 0 and --lm-kl 0")
    objective.check(inputs.router, len(inputs.layers))
    run = _Run(inputs, stock, options, window, state)
    first, history = run.resume(), []
    with stop_signals() as stop:
        for step in range(first, run.steps + 1):
            numbers = run.step(step)
            history.append(numbers)
            on_step(numbers)
            last = step == run.steps
            if stop.is_set() or (not last and step % options.save_every == 0):
                run.save(step)
            if stop.is_set() and not last:
                raise KeyboardInterrupt
    return Tuned({**stock, **run.done}, dict(stock), history, options.steps)


def measure_layers(
    inputs: Inputs, tensors: dict[str, Tensor], stock: dict[str, Tensor], slots: Sequence[int]
) -> Numbers:
    """eor, changed and misses_C per token (all layers) of gates on recorded inputs, documents as they are."""
    totals: Numbers = {}
    for position, layer in enumerate(inputs.layers):
        name = f"layer_{layer:02d}"
        bias = stock.get(f"{name}.choice_bias")
        for hidden, segments in zip(inputs.hidden, inputs.segments, strict=True):
            h = torch.from_numpy(hidden[:, position]).float()
            logits, reference = (h @ gates[f"{name}.weight"].T for gates in (tensors, stock))
            experts = choose(inputs.router, logits, bias)
            one = Routed(
                logits[None], reference[None], experts[None], None if bias is None else bias[None, None], segments
            )
            share = len(segments) / inputs.tokens
            for size in slots:
                numbers = routing_numbers(inputs.router, one, size)
                totals[f"misses_{size}"] = totals.get(f"misses_{size}", 0.0) + share * numbers["misses_per_token"]
            for key in ("eor", "changed"):
                totals[key] = totals.get(key, 0.0) + share * numbers[key] / len(inputs.layers)
    return totals


class _Run:
    """Layers one after another; step n (from 1) is one of layer (n - 1) // `options.steps`."""

    def __init__(
        self, inputs: Inputs, stock: dict[str, Tensor], options: TuneOptions, window: int, state: Path | None
    ) -> None:
        self._inputs, self._stock, self._options, self._window, self._state = inputs, stock, options, window, state
        self.steps = options.steps * len(inputs.layers)
        self.done: dict[str, Tensor] = {}  # gates of finished layers
        self._layer: _Layer | None = None
        data = hashlib.sha256(f"{inputs.sha256} in windows of {window}".encode()).hexdigest()
        self._identity = Identity(options.digest(), data, gates_sha256(stock), 1)

    def resume(self) -> int:
        """The first step that is left. Raises UsageError for the state of another run."""
        if self._state is None or not self._state.exists():
            return 1
        step = step_of_state(self._state)
        position = min((step - 1) // self._options.steps, len(self._inputs.layers) - 1)  # if it is of this run
        began = position * self._options.steps
        self._layer = self._open(position)
        load_state(self._state, [self._layer.weight], self._layer.optimizer, self._identity, began)
        self._layer.skip(step - began)
        self.done = done_of_state(self._state)
        return step + 1

    def step(self, step: int) -> Numbers:
        """The numbers of one step."""
        position, before = divmod(step - 1, self._options.steps)
        if self._layer is None or before == 0:
            self._finish()
            self._layer = self._open(position)
        numbers = self._layer.step(before + 1)
        if not math.isfinite(numbers["loss"]):
            raise EdgeError(
                f"step {step}: the loss is {numbers['loss']}: lower the learning rate or the largest weight"
            )
        if step == self.steps:
            self._finish()
        return {"step": step, "layer": self._inputs.layers[position], **numbers}

    def save(self, step: int) -> None:
        """Keep the state after `step`, where a file for it was named."""
        if self._state is not None and self._layer is not None:
            save_state(self._state, step, [self._layer.weight], self._layer.optimizer, self._identity, self.done)

    def _open(self, position: int) -> _Layer:
        layer = self._inputs.layers[position]
        return _Layer(self._inputs, self._stock, position, layer, self._options, self._window)

    def _finish(self) -> None:
        if self._layer is not None:
            self.done[self._layer.name] = self._layer.weight.detach().clone()


class _Layer:
    """One gate and its windows of inputs."""

    def __init__(
        self, inputs: Inputs, stock: dict[str, Tensor], position: int, layer: int, options: TuneOptions, window: int
    ) -> None:
        self._options, self._router = options, inputs.router
        self._prior = options.objective.cache_prior(inputs.router)
        self._strength = (options.objective.layer_strength or (1.0,) * len(inputs.layers))[position]
        self.name = f"layer_{layer:02d}.weight"
        self._reference = stock[self.name].float()
        self._bias = stock.get(f"layer_{layer:02d}.choice_bias")
        self.weight = torch.nn.Parameter(self._reference.clone())
        self.optimizer = torch.optim.AdamW([self.weight], lr=options.lr, weight_decay=options.weight_decay)
        self._windows: list[tuple[Tensor, Tensor]] = []
        for hidden, segments in zip(inputs.hidden, inputs.segments, strict=True):
            h = torch.from_numpy(hidden[:, position].copy())
            parts = zip(h.split(window), segments.split(window), strict=True)
            self._windows += [(a, b) for a, b in parts if len(a) >= 2]
        if not self._windows:
            raise UsageError("the trace is too short: it needs at least two tokens in a row")
        self._order = torch.Generator().manual_seed(options.seed)

    def skip(self, steps: int) -> None:
        """Leave out the windows of steps that were done before the interruption."""
        for _ in range(steps):
            self._draw()

    def _draw(self) -> list[int]:
        places: list[int] = torch.randint(len(self._windows), (self._options.batch,), generator=self._order).tolist()
        return places

    def step(self, step: int) -> Numbers:
        begin, options = time.perf_counter(), self._options
        objective = options.objective
        total: Numbers = {}
        tokens = 0
        self.optimizer.zero_grad()
        for place in self._draw():
            hidden, segments = self._windows[place]
            tokens += len(segments)
            routed = self._route(hidden.float(), segments)
            terms = layer_terms(objective, self._router, routed)
            loss = combine(_with_strength(objective, self._strength), terms, objective.alpha(step))
            (loss / options.batch).backward()  # type: ignore[no-untyped-call]
            numbers = {"loss": float(loss.detach()), **{n: float(t.detach()) for n, t in terms.items()}}
            numbers |= routing_numbers(self._router, routed, objective.slots(self._router))
            for name, value in numbers.items():
                total[name] = total.get(name, 0.0) + value / options.batch
        norm = torch.nn.utils.clip_grad_norm_([self.weight], options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate(step)
        self.optimizer.step()
        seconds = time.perf_counter() - begin
        rest = {"grad_norm": float(norm), "lr": options.learning_rate(step), "seconds": round(seconds, 5)}
        return {**total, **rest, "tokens_per_s": round(tokens / seconds, 1)}

    def _route(self, h: Tensor, segments: Tensor) -> Routed:
        logits = h @ self.weight.T
        if self._prior is None:
            experts = choose(self._router, logits, self._bias)
        else:
            experts = choose_with_prior(self._router, logits.detach(), self._bias, segments, self._prior)
        bias = None if self._bias is None else self._bias[None, None]
        return Routed(logits[None], (h @ self._reference.T)[None], experts[None], bias, segments)


def _with_strength(objective: Objective, strength: float) -> Objective:
    """The objective of one layer."""
    return replace(objective, layer_strength=(strength,))
