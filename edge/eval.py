"""`edge eval`: what routers cost in quality and save in reads, in one table; tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from edge import console
from edge.options import add_setup_arguments, engine_options
from edge.simulate import default_slots
from runtime.cache_prior import CachePrior, Scaling
from runtime.errors import UsageError
from runtime.options import PRIOR_NEEDS, EngineOptions

if TYPE_CHECKING:
    from remoe.evaluate import Evaluation
    from remoe.trace import Origin
    from runtime.engine import Engine

NAME = "eval"
HELP = "judge routers: quality against the stock router, and what they read"
EXAMPLES = """
edge eval qwen.bundle --text held-out.jsonl --tokens 8192 --router base remoe-chat.safetensors
edge eval qwen.bundle --text book.txt --routing cache-prior --prior-strength 0.05 0.1 0.2 --slots 8 16
edge eval qwen.bundle --workload gsm8k --prompts 32 --router tuned.safetensors --json
edge eval qwen.bundle --tasks arc_easy --limit 100 --router tuned.safetensors
"""

# Which options say something about which source of what is judged.
_TEXTS = ("window", "tokens", "slots", "segment", "save_traces")
_OF_SOURCES = {"text": _TEXTS, "workload": (*_TEXTS, "prompts"), "tasks": ("limit", "task_folder")}
_SEGMENT = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge eval`."""
    run = add_setup_arguments(parser)
    run.add_argument("--router", metavar="R", nargs="+", help="routers to judge, by name or path (default: base)")
    run.add_argument("--routing", choices=["stock", "cache-prior"],
                     help="cache-prior: judge each router with that rule, too (default: stock)")  # fmt: skip
    run.add_argument("--prior-strength", metavar="X", type=float, nargs="+", help="strengths to judge (default: 0.1)")
    run.add_argument("--prior-top-j", metavar="J", type=int, help="so many of the true best get the bonus, too")
    run.add_argument("--prior-scaling", choices=get_args(Scaling), help="by spread of logits, or energy")
    group = parser.add_argument_group("what is judged")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FILE", type=Path, nargs="+", help=".txt, or .jsonl with one text per line")
    source.add_argument("--workload", metavar="W", help="the prompts of a workload, read as texts: as in edge profile")
    source.add_argument("--tasks", metavar="T", nargs="+", help="tasks of lm-evaluation-harness, by name (extra: eval)")
    add = group.add_argument
    add("--window", metavar="N", type=int, help="tokens of text per request (default: 512, or the context)")
    add("--tokens", metavar="N", type=int, help="so many tokens of text in all")
    add("--prompts", metavar="N", type=int, help="with --workload: only so many of its prompts")
    add("--slots", metavar="N", type=int, nargs="+",
        help="sizes of the judged caches, per layer (default: K, 1.3 K, 2 K, E/2 and 0.9 E)")  # fmt: skip
    add("--segment", metavar="N", type=int, help=f"tokens of a segment of SRP and SCH (default: {_SEGMENT})")
    add("--save-traces", metavar="DIR", type=Path, help="keep the routing of each variant, for edge simulate")
    add("--limit", metavar="N", type=int, help="with --tasks: only so many examples of each")
    add("--task-folder", metavar="DIR", type=Path, help="with --tasks: a folder with task files of your own")
    add("--download", metavar="DIR", type=Path, default=Path("out/download"), help="where workloads are kept")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Judge and print. Raises EdgeError."""
    base, routers, priors = _options(args)
    _check_source(args)
    if args.tasks:
        return _run_tasks(args, base, routers, priors)
    from runtime.engine import Engine

    with Engine.open(args.bundle, base) as engine:
        for line in engine.notes:
            console.note(line)
        results = _judge(engine, args, routers, priors)
    if args.save_traces:
        _save(results, args.save_traces)
    if args.json:
        console.print_json({"policy": base.policy, "results": [_json(result) for result in results]})
    else:
        print(console.format_table(quality_rows(results), title="quality and reads"))
        print(console.format_table(routing_rows(results, _segment(args)), title="routing"))
    return 0


def _check_source(args: argparse.Namespace) -> None:
    """Refuses options of another source than the one that is judged, and a folder that cannot be. Raises UsageError."""
    source = next(name for name in _OF_SOURCES if getattr(args, name))
    for name in sorted({name for names in _OF_SOURCES.values() for name in names} - set(_OF_SOURCES[source])):
        if getattr(args, name) is not None:
            owners = " or ".join(f"--{owner}" for owner, names in _OF_SOURCES.items() if name in names)
            raise UsageError(f"--{name.replace('_', '-')} goes with {owners}, not with --{source}: leave it out")
    for name in ("prompts", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.save_traces:
        there = next(path for path in (args.save_traces, *args.save_traces.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UsageError(f"--save-traces {args.save_traces}: {there} is no folder that can be written to")


def _options(args: argparse.Namespace) -> tuple[EngineOptions, list[str], list[CachePrior]]:
    """How the engine is opened, which routers are judged, and with which cache-priors beside the stock rule."""
    routers, strengths = args.router or [EngineOptions.router], args.prior_strength or [EngineOptions.prior_strength]
    said = (args.prior_strength, args.prior_top_j, args.prior_scaling)
    if args.routing != "cache-prior" and any(value is not None for value in said):
        raise UsageError(PRIOR_NEEDS)
    routing = dict.fromkeys(("routing", "prior_strength", "prior_top_j", "prior_scaling"))
    plain = engine_options(argparse.Namespace(**{**vars(args), **routing, "router": routers[0]}))
    return plain, routers, _priors(args, strengths) if args.routing == "cache-prior" else []


def _priors(args: argparse.Namespace, strengths: list[float]) -> list[CachePrior]:
    default = CachePrior()
    top_j = default.top_j if args.prior_top_j is None else args.prior_top_j
    return [CachePrior(strength, top_j, args.prior_scaling or default.scaling) for strength in strengths]


def _judge(engine: Engine, args: argparse.Namespace, routers: list[str], priors: list[CachePrior]) -> list[Evaluation]:
    from remoe.evaluate import EvalOptions, Variant, evaluate

    windows, source = _windows(engine, args)
    router = engine.config.router
    sizes = args.slots or default_slots(router.top_k, router.num_experts)
    options = EvalOptions(tuple(sizes), engine.options.policy, _segment(args))
    variants = [Variant(router) for router in routers]
    variants += [Variant(router, prior, slots) for router in routers for prior in priors for slots in sizes]
    with console.Progress(quiet=args.json, unit="windows") as progress:
        return evaluate(
            engine, variants, windows, source, options, lambda done, total: progress.update("windows", done, total)
        )


def _segment(args: argparse.Namespace) -> int:
    return _SEGMENT if args.segment is None else args.segment


def _windows(engine: Engine, args: argparse.Namespace) -> tuple[list[list[int]], Origin]:
    from remoe.trace import Origin
    from remoe.windows import text_windows, window_tokens, windows

    if args.text:
        return text_windows(engine, args.text, args.window, args.tokens)
    from profiles.workloads import load_workload

    workload = load_workload(args.workload, args.download)
    ids = [engine.encode(prompt.text) for prompt in workload.prompts[: args.prompts]]
    return windows(ids, window_tokens(engine, args.window), args.tokens), Origin(workload.name, workload.sha256)


def _save(results: list[Evaluation], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, result in enumerate(results):
        path = folder / f"{number:02d}-{Path(result.variant.router).stem}.trace.safetensors"
        result.trace.save(path)
        console.note(f"{_name(result.variant.router, result.variant.prior)}: {path}")


def _name(router: str, prior: CachePrior | None) -> str:
    return Path(router).stem + ("" if prior is None else f", {prior}")


def quality_rows(results: list[Evaluation]) -> list[list[str]]:
    """One row per variant and size of cache."""
    stock = results[0].quality.perplexity
    rows = [["router", "slots", "perplexity", "change", "KL", "top-1", "route", "misses/token", "MB/token", "optimum"]]
    for result in results:
        quality = result.quality
        for cache in result.caches:
            found = cache.result
            rows.append([
                _name(result.variant.router, result.variant.prior), str(cache.slots), f"{quality.perplexity:.4f}",
                f"{quality.perplexity / stock - 1:+.2%}", f"{quality.mean_kl:.5f}", f"{quality.top1_agreement:.4f}",
                f"{result.route_agreement:.4f}", f"{found.misses / found.decode_tokens:.2f}",
                f"{found.bytes_per_token / 1e6:.2f}", f"{cache.share:.3f}",
            ])  # fmt: skip
    return rows


def routing_rows(results: list[Evaluation], segment: int) -> list[list[str]]:
    """One row per variant; SCH for its first size of cache."""
    rows = [["router", "EOR", "load CV", "load entropy", "distinct", f"SRP({segment})", f"SCH({segment}, slots)"]]
    for result in results:
        found, name = result.locality, _name(result.variant.router, result.variant.prior)
        rows.append([
            name, _number(found.overlap), f"{found.load_cv:.3f}", f"{found.load_entropy:.4f}",
            f"{found.distinct_experts:.1f}", _number(found.srp), f"{_number(found.sch)} ({result.caches[0].slots})",
        ])  # fmt: skip
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _json(result: Evaluation) -> dict[str, Any]:
    quality, variant = result.quality, result.variant
    return {
        "router": variant.router,
        "router_sha256": result.trace.info.router.sha256,
        "routing": result.trace.info.routing,
        "prior_slots": variant.slots,
        "source": dataclasses.asdict(result.trace.info.source),
        "predicted_tokens": quality.tokens,
        "perplexity": quality.perplexity,
        "kl": quality.mean_kl,
        "top1_agreement": quality.top1_agreement,
        "route_agreement": result.route_agreement,
        **dataclasses.asdict(result.locality),
        "caches": [
            {
                "slots": cache.slots,
                "unique_hit_rate": cache.result.unique_hit_rate,
                "misses": cache.result.misses,
                "requests": cache.result.requests,
                "bytes_per_token": cache.result.bytes_per_token,
                "share_of_optimum": cache.share,
            }
            for cache in result.caches
        ],
    }


def _run_tasks(args: argparse.Namespace, base: EngineOptions, routers: list[str], priors: list[CachePrior]) -> int:
    """Tasks of lm-evaluation-harness, for each router and prior in turn, on the engine's own cache."""
    from remoe.harness import run_tasks
    from runtime.engine import Engine

    found: dict[str, dict[str, dict[str, float]]] = {}
    with Engine.open(args.bundle, base) as engine:
        for line in engine.notes:
            console.note(line)
        for router in routers:
            for prior in (None, *priors):
                engine.use_router(router, prior)
                found[_name(router, prior)] = run_tasks(engine, args.tasks, args.limit, args.task_folder)
    if args.json:
        console.print_json({"results": found})
        return 0
    rows = [
        [name, task, metric, f"{value:.4f}"]
        for name, tasks in found.items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    ]
    print(console.format_table([["router", "task", "metric", "value"], *rows]))
    return 0
