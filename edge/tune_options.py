"""Options of `edge tune`, one for every setting of the objective and of the run; defaults come from the dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from remoe.objective import PRESETS, Objective
from remoe.tune_options import TuneOptions
from runtime.errors import UsageError

_TERMS = {
    "ce": "next-token cross-entropy of the whole model",
    "trust": "KL(new gate || stock gate), lambda_KL",
    "reuse": "probability of what is reused, lambda_R",
    "smooth": "symmetric KL of neighbouring tokens, lambda_S",
    "lag": "the same over --lags, lambda_L",
    "window": "entropy of the mean over --window-size tokens, lambda_W",
    "lm_kl": "KL(stock model || tuned model) of the next token",
    "margin": "hinge between uncached choices and cached experts just below them",
    "miss": "experts on the wrong side of the top-k boundary, counted softly",
}
_SETTINGS = {
    "lags": "distances of --lag",
    "window_size": "tokens of a block of --window",
    "warmup_steps": "steps until the locality terms have their full weight",
    "reuse_target": "previous: the last token's experts, as published; cache: content of the simulated cache",
    "cache_slots": "experts per layer in the simulated LRU cache; 0: those of one token",
    "margin_gap": "of --margin, in standard deviations of a token's logits",
    "margin_reach": "pairs further apart are left alone",
    "margin_pairs": "pairs per token",
    "miss_softness": "width of the boundary of --miss, in standard deviations of a token's logits",
    "prior": "strength of cache-prior routing while tuning; use the same at inference",
    "prior_top_j": "its --prior-top-j",
    "prior_scaling": "its scaling: mean, token or energy",
    "sharpen": "the terms of distributions see softmax(sharpen * logits); above 1 for flat gates",
    "layer_strength": "factors on the locality terms, one per layer with experts",
}
_RUN = {
    "steps": "updates of the gates",
    "batch": "sequences per step, over all processes",
    "micro_batch": "sequences at once in one process",
    "lr": "learning rate of AdamW; flat gates of small models need far more",
    "lr_warmup_steps": "steps until it is reached",
    "schedule": "constant, or cosine: falls to 0",
    "weight_decay": "of AdamW",
    "clip": "largest norm of the gradient",
    "head_share": "share of tokens, drawn anew each step, that take part in --ce and --lm-kl",
    "seed": "of the order of sequences",
    "save_every": "steps between two states on disk",
}
# What says nothing while the term that it belongs to has the weight 0.
_OF_A_TERM = {
    "lags": "lag",
    "window_size": "window",
    "margin_gap": "margin",
    "margin_reach": "margin",
    "margin_pairs": "margin",
    "miss_softness": "miss",
    "prior_top_j": "prior",
    "prior_scaling": "prior",
}
# Names that say more on a command line than in the dataclass.
_FLAGS = {"warmup_steps": "locality-warmup", "lr_warmup_steps": "lr-warmup"}


def add_objective_arguments(parser: argparse.ArgumentParser) -> None:
    """--preset, a weight for each term, and the settings of the terms."""
    group = parser.add_argument_group("objective")
    group.add_argument("--preset", choices=list(PRESETS), default="remoe", help="defaults below (default: %(default)s)")
    _add(group, Objective(), {**_TERMS, **_SETTINGS})
    group.add_argument("--no-hidden-gradient", dest="hidden_gradient", action="store_false", default=None,
                       help="layer terms do not reach the gates of layers below")  # fmt: skip


def add_run_arguments(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Steps, learning rate and the rest."""
    group = parser.add_argument_group("run")
    _add(group, TuneOptions(), {name: text for name, text in _RUN.items() if name not in without})
    group.add_argument("--gradient-checkpointing", action="store_true", help="compute layers twice, keep less memory")


def tune_options(args: argparse.Namespace) -> TuneOptions:
    """What the arguments ask for. Raises UsageError for text that is no value of its setting."""
    given = _given(args, Objective(), [*_TERMS, *_SETTINGS])
    if args.hidden_gradient is not None:
        given["hidden_gradient"] = args.hidden_gradient
    objective = dataclasses.replace(PRESETS[args.preset], **given)
    for name, term in _OF_A_TERM.items():
        if name in given and not getattr(objective, term):
            raise UsageError(f"{_flag(name)} changes nothing while --{term} is 0: set --{term}, or leave it out")
    run = _given(args, TuneOptions(), list(_RUN))
    return TuneOptions(objective, gradient_checkpointing=args.gradient_checkpointing, **run)


def _add(group: argparse._ArgumentGroup, defaults: Any, helps: dict[str, str]) -> None:
    for name, text in helps.items():
        value = getattr(defaults, name)
        shown = ",".join(map(str, value)) or "1 each" if isinstance(value, tuple) else value
        kind = type(value).__name__ if not isinstance(value, tuple) else "a,b,..."
        group.add_argument(_flag(name), dest=name, metavar=kind.upper(), help=f"{text} (default: {shown})")


def _given(args: argparse.Namespace, defaults: Any, names: list[str]) -> dict[str, Any]:
    """Values of the options that were given, of the type of their default."""
    values = {}
    for name in names:
        text, default = getattr(args, name, None), getattr(defaults, name)
        if text is None:
            continue
        flag = _flag(name)
        try:
            if isinstance(default, tuple):
                kind = int if default else float
                values[name] = tuple(kind(part) for part in text.split(","))
            else:
                values[name] = type(default)(text)
        except ValueError:
            wanted = type(default).__name__ + f", as {default!r}"
            if isinstance(default, tuple):
                wanted = f"numbers with commas, as {','.join(map(str, default or (1.0, 0.5)))}"
            raise UsageError(f"{flag} {text!r}: expected {wanted}") from None
    return values


def _flag(name: str) -> str:
    return "--" + _FLAGS.get(name, name).replace("_", "-")
