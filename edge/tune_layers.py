"""`edge tune --from-trace`: gates tuned from recorded router inputs, without the model."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edge import console
from edge.tune_view import TuneView
from runtime.errors import UsageError

if TYPE_CHECKING:
    import torch

    from remoe.trace import TraceInfo
    from remoe.tune_options import TuneOptions

_OF_THE_MODEL = (
    "data", "start", "eval_data", "eval_sequences", "eval_slots", "tokenizer", "dtype", "device", "experts",
    "micro_batch", "head_share", "gradient_checkpointing", "hidden_gradient",
)  # fmt: skip
_FLAGS = {"hidden_gradient": "no_hidden_gradient"}


def run_layers(args: argparse.Namespace, options: TuneOptions) -> int:
    """Tune layer by layer, measure on the same inputs, write. Raises UsageError."""
    from edge.tune import finish, open_log, save, state_path
    from remoe.layerwise import inputs_of, measure_layers, tune_layers
    from remoe.trace import Trace
    from runtime.router_file import gates_sha256

    _refuse_model_options(args)
    if "ce" in vars(args) and args.ce is None and args.lm_kl is None:
        options = dataclasses.replace(options, objective=dataclasses.replace(options.objective, ce=0.0, lm_kl=0.0))
    traces = [Trace.load(path) for path in args.from_trace]
    info = traces[0].info
    stock = stock_gates(args.router, info)
    inputs = inputs_of(traces, gates_sha256(stock), [str(p) for p in args.from_trace])
    slots = sorted({info.top_k, min(2 * info.top_k, info.num_experts), options.objective.slots(inputs.router)})
    if not args.json:
        console.note(f"{inputs.tokens:,} tokens of router inputs, {len(inputs.layers)} layers")
    log = open_log(args)
    before = measure_layers(inputs, stock, stock, slots)
    began = time.perf_counter()
    with TuneView(options.steps * len(inputs.layers), args.json) as view:

        def on_step(numbers: dict[str, float]) -> None:
            view.show(numbers)
            log.write(numbers)

        window = min(args.sequence_length, inputs.tokens)
        tuned = tune_layers(inputs, stock, options, window, on_step, state_path(args.out))
    seconds = round(time.perf_counter() - began, 1)
    after = measure_layers(inputs, tuned.tensors, stock, slots)
    data = {"sha256": inputs.sha256, "files": [p.name for p in args.from_trace], "tokens": inputs.tokens}
    metrics = {"before": before, "after": after}
    save(args, options, tuned, info.model, data, metrics)
    finish(args, log, {**metrics, "seconds": seconds, "steps": tuned.steps})
    return 0


def stock_gates(router: Path | None, info: TraceInfo) -> dict[str, torch.Tensor]:
    """The base router: of a bundle, or a file. Raises UsageError."""
    from runtime.layout import BASE_ROUTER
    from runtime.router_file import load_router

    if router is None:
        raise UsageError("--from-trace needs the stock gates: --router BUNDLE, or --router FILE of routers/base")
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in info.moe_layers:
        shapes[f"layer_{layer:02d}.weight"] = (info.num_experts, info.hidden_size)
        if info.rules.choice_bias:
            shapes[f"layer_{layer:02d}.choice_bias"] = (info.num_experts,)
    tensors, provenance = load_router(router / BASE_ROUTER if router.is_dir() else router, shapes)
    if provenance is not None:
        raise UsageError(
            f"{router}: holds tuned gates: trust and the fingerprint need the stock ones (a bundle's base)"
        )
    return tensors


def _refuse_model_options(args: argparse.Namespace) -> None:
    if args.checkpoint:
        raise UsageError("CHECKPOINT has no meaning with --from-trace, which tunes without the model")
    for name in _OF_THE_MODEL:
        default = False if name == "gradient_checkpointing" else None
        if getattr(args, name) is not default:
            flag = f"--{_FLAGS.get(name, name).replace('_', '-')}"
            raise UsageError(f"{flag} has no meaning with --from-trace, which tunes without the model: leave it out")
