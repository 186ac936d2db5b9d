"""Records the routing of a running engine: of its own generations, or of text that it is made to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

from remoe.trace import Block, Origin, TraceInfo
from remoe.trace_file import Array
from runtime.decoder import prefill_chunk
from runtime.engine import Engine, GenerateOptions
from runtime.router_file import gates_sha256

Sink = Callable[[Block], None]


class Watcher:
    """Sees what every layer routes, and hands it out token by token once all layers have seen the token."""

    def __init__(self, engine: Engine, logits: bool = False, hidden: bool = False) -> None:
        self._wanted = ["experts", "weights", *(["logits"] if logits else []), *(["hidden"] if hidden else [])]
        self._layers = engine.config.moe_layers
        self._seen: dict[int, list[dict[str, Array]]] = {layer: [] for layer in self._layers}

    def see(
        self, layer: int, h: torch.Tensor, logits: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """An observer of a router."""
        found = {"experts": experts, "weights": weights, "logits": logits, "hidden": h}
        self._seen[layer].append({name: _array(found[name]) for name in self._wanted})

    def forget(self) -> None:
        """A new request begins."""
        for rows in self._seen.values():
            rows.clear()

    def take(self, request: int, tokens: Sequence[int], prompt_tokens: int, first: int = 0) -> Block | None:
        """What was seen since the last call as one block, or None: `tokens` were the inputs, from position `first` on.

        Tokens that not all layers have seen, because the run was cut off, are left out.
        """
        parts = {name: [[part[name] for part in self._seen[layer]] for layer in self._layers] for name in self._wanted}
        self.forget()
        if not all(parts["experts"]):
            return None
        layers = {name: [np.concatenate(rows) for rows in found] for name, found in parts.items()}
        count = min(len(tokens), *(len(rows) for rows in layers["experts"]))
        stacked = {name: np.stack([rows[:count] for rows in found], axis=1) for name, found in layers.items()}
        positions = np.arange(first, first + count)
        return Block(
            tokens=np.array(tokens[:count]),
            requests=np.full(count, request),
            positions=positions,
            decode=positions >= prompt_tokens,
            **stacked,
        )


@contextmanager
def watching(engine: Engine, logits: bool = False, hidden: bool = False) -> Iterator[Watcher]:
    """A watcher on the engine's router, for as long as the context lasts."""
    watcher = Watcher(engine, logits, hidden)
    engine.decoder.router.observer = watcher.see
    try:
        yield watcher
    finally:
        engine.decoder.router.observer = None


def record_generation(
    engine: Engine, watcher: Watcher, request: int, prompt: Sequence[int], options: GenerateOptions,
    stop: Callable[[], bool] = lambda: False,
) -> Block | None:  # fmt: skip
    """Generate an answer; the block has the prompt's tokens and all of the answer but its last, which was no input.

    Raises what the engine raises; `stop` is asked after every token.
    """
    watcher.forget()
    tokens, answer = engine.generate(prompt, options), []
    try:
        for token in tokens:
            answer.append(token.id)
            if stop():
                break
    finally:
        tokens.close()
    return watcher.take(request, [*prompt, *answer], len(prompt))


def record_text(engine: Engine, watcher: Watcher, request: int, window: Sequence[int], stepwise: bool) -> Block | None:
    """Make the engine read a window of text; every token counts as a decode step.

    `stepwise` feeds tokens one by one, as cache-prior routing needs it; otherwise all at once, which routes stock
    gates the same and takes far less time, but leaves another cache behind.
    """
    watcher.forget()
    engine.decoder.rewind()
    ids = torch.tensor(window)
    for part in ids.split(1) if stepwise else [ids]:
        engine.decoder.forward(part)
    return watcher.take(request, window, prompt_tokens=0)


def info_of(engine: Engine, kind: Literal["generated", "teacher-forced"], source: Origin) -> TraceInfo:
    """Facts of what this engine records, with the router that it uses now."""
    config, manifest, options = engine.config, engine.bundle.manifest, engine.options
    return TraceInfo(
        kind=kind,
        model=manifest.source.name,
        gates_sha256=engine.gates_sha256,
        router=Origin(options.router, gates_sha256(engine.router.tensors())),
        source=source,
        moe_layers=config.moe_layers,
        num_experts=config.router.num_experts,
        top_k=config.router.top_k,
        hidden_size=config.hidden_size,
        expert_bytes=manifest.expert.file_bytes,
        prefill_chunk=prefill_chunk(config),
        rules=config.router,
        routing=str(options.prior or "stock"),
    )


def choice_bias(engine: Engine) -> Array | None:
    """[L, E] fp32 of the router in use, for families that have one."""
    biases = engine.router.biases
    return np.stack([_array(biases[layer]) for layer in engine.config.moe_layers]) if biases else None


def _array(values: torch.Tensor) -> Array:
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()
