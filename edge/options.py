"""The options that `generate` and `chat` share: words of the command line to the frozen options of the engine.

Defaults are those of the dataclasses; an option that is not given stays None, so that what a person said can be told
from what nobody said.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from edge import console
from edge.console import parse_size
from runtime.backends import BackendName, ExpertKernelName
from runtime.cache import Scope
from runtime.cache_prior import Scaling
from runtime.errors import UsageError
from runtime.options import DEFAULT_CONTEXT, DTYPES, EngineOptions, GenerateOptions
from runtime.policies import POLICIES

Options = TypeVar("Options", EngineOptions, GenerateOptions)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """How the bundle is run."""
    run = add_setup_arguments(parser)
    run.add_argument("--router", metavar="R", help=_help(EngineOptions, "router", "router file, by name or path"))
    add_routing_arguments(run)
    run.add_argument("--record", metavar="FILE.jsonl", type=Path, help="write one JSON line per token")


def add_setup_arguments(parser: argparse.ArgumentParser, policy: bool = True) -> argparse._ArgumentGroup:
    """How the bundle is opened, whatever routes it; returns the last group. `policy` False: the command has its own."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a bundle made by edge export")
    cache = parser.add_argument_group("expert cache")
    size = cache.add_mutually_exclusive_group()
    size.add_argument(
        "--expert-memory", dest="expert_memory_bytes", metavar="SIZE", type=argument(parse_size),
        help="memory for experts, like 512M or 4GiB (default: what fits beside the rest)",
    )  # fmt: skip
    size.add_argument("--slots-per-layer", metavar="N", type=int, help="the same, in experts per layer")
    cache.add_argument(
        "--scope",
        choices=get_args(Scope),
        help=_help(EngineOptions, "scope", "each layer has its own slots, or all share them"),
    )
    if policy:
        cache.add_argument(
            "--policy", choices=list(POLICIES), help=_help(EngineOptions, "policy", "which expert makes room")
        )
    cache.add_argument(
        "--prefetch",
        metavar="N",
        type=int,
        help="experts of the next layer that are read on a guess (default: 1 on a CPU with memory for it, else 0)",
    )
    cache.add_argument("--no-direct-io", dest="direct_io", action="store_const", const=False,
                       help="read through the page cache instead of past it")  # fmt: skip
    cache.add_argument(
        "--read-threads", metavar="N", type=int, help=_help(EngineOptions, "read_threads", "reads in flight")
    )
    run = parser.add_argument_group("model")
    run.add_argument("--backend", choices=get_args(BackendName), help=_help(EngineOptions, "backend", "who computes"))
    run.add_argument("--dtype", choices=["auto", *DTYPES], help=_help(EngineOptions, "dtype", "compute precision"))
    run.add_argument("--context", metavar="N", type=int,
                     help=f"tokens of prompt and answer (default: the model's, at most {DEFAULT_CONTEXT})")  # fmt: skip
    run.add_argument("--threads", metavar="N", type=int, help="threads of the arithmetic (default: one per core)")
    run.add_argument("--expert-kernel", choices=get_args(ExpertKernelName),
                     help=_help(EngineOptions, "expert_kernel", "on a GPU: one token's expert"))  # fmt: skip
    run.add_argument("--cuda-graphs", action="store_const", const=True,
                     help="with --backend tensorrt: launch each block of a token as one CUDA graph")  # fmt: skip
    return run


def add_routing_arguments(group: argparse._ArgumentGroup) -> None:
    """Stock routing, or towards what is in the cache."""
    group.add_argument(
        "--routing", choices=["stock", "cache-prior"],
        help="cache-prior: prefer experts that are in the cache; changes what comes out (default: stock)",
    )  # fmt: skip
    add_prior_arguments(group)


def add_prior_arguments(group: argparse._ArgumentGroup) -> None:
    """How cached experts are preferred."""
    add, default = group.add_argument, functools.partial(_help, EngineOptions)
    add("--prior-strength", metavar="X", type=float,
        help=default("prior_strength", "cache-prior: bonus of a cached expert, in spreads of logits"))  # fmt: skip
    add("--prior-top-j", metavar="J", type=int,
        help=default("prior_top_j", "cache-prior: so many of the true best get the bonus, too"))  # fmt: skip
    add("--prior-scaling", choices=get_args(Scaling),
        help=default("prior_scaling", "cache-prior: mean or token: spread of logits; energy: weights"))  # fmt: skip


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """How text is chosen."""
    group = parser.add_argument_group("text")
    add = group.add_argument
    add(
        "--max-new-tokens", metavar="N", type=int, help=_help(GenerateOptions, "max_new_tokens", "length of the answer")
    )
    add("--temperature", metavar="T", type=float, help=_help(GenerateOptions, "temperature", "0 is greedy"))
    add("--top-k", metavar="N", type=int, help=_help(GenerateOptions, "top_k", "only the N best tokens, 0: all"))
    add("--top-p", metavar="P", type=float, help=_help(GenerateOptions, "top_p", "only the best that reach this share"))
    add("--repetition-penalty", metavar="X", type=float,
        help=_help(GenerateOptions, "repetition_penalty", "above 1: avoid what was said"))  # fmt: skip
    add("--seed", metavar="N", type=int, help=_help(GenerateOptions, "seed", "equal seeds draw equal tokens"))
    add("--stop", metavar="TEXT", action="append", help="end before this text; may be given several times")
    add("--ignore-eos", action="store_const", const=True, help="go on after an end-of-text token")


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """What the engine arguments say."""
    return _build(EngineOptions, args, {})


def generate_options(args: argparse.Namespace, defaults: Mapping[str, Any] | None = None) -> GenerateOptions:
    """What the text arguments say; `defaults` stand between them and the dataclass. Raises UsageError."""
    options = _build(GenerateOptions, args, defaults or {})
    options.check()  # before anything is loaded
    if "" in options.stop:
        raise UsageError("--stop '': an empty text is found everywhere; leave it out")
    return dataclasses.replace(options, stop=tuple(options.stop))


def note_greedy(args: argparse.Namespace, options: GenerateOptions) -> None:
    """Say which options of drawing tokens were given although none is drawn."""
    given = [f"--{name.replace('_', '-')}" for name in ("top_k", "top_p", "seed") if getattr(args, name) is not None]
    if given and options.temperature == 0:
        verb = "changes" if len(given) == 1 else "change"
        console.note(
            f"{' and '.join(given)} {verb} nothing at temperature 0, which takes the best token: --temperature T"
        )


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser that raises UsageError, as a `type` of argparse, which adds the option's name to the message."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _build(cls: type[Options], args: argparse.Namespace, defaults: Mapping[str, Any]) -> Options:
    said = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(cls)}
    return cls(**{**defaults, **{name: value for name, value in said.items() if value is not None}})


def _help(cls: type[EngineOptions] | type[GenerateOptions], name: str, text: str) -> str:
    return f"{text} (default: {getattr(cls, name)})"
