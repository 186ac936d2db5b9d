"""`edge bench`: settings of one bundle against each other in one interleaved run, with the machine's ceiling beside."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edge import console
from edge.bench_table import ceiling_line, table_rows, tpot_less
from edge.interrupt import Interrupt
from edge.options import add_prior_arguments, add_setup_arguments, engine_options
from runtime.errors import EdgeError, UsageError
from runtime.options import PRIOR_NEEDS, EngineOptions
from runtime.policies import GATE, POLICIES

if TYPE_CHECKING:
    from profiles.contest import Outcome
    from profiles.rivals import Job, Rival
    from remoe.trace import Trace
    from runtime.engine import Engine

NAME = "bench"
HELP = "compare routers, routing rules, policies and recorded routing of one bundle in one interleaved run"
EXAMPLES = """
edge bench qwen.bundle --router base --router remoe-chat --slots-per-layer 8 --prompts 32
edge bench qwen.bundle --routing stock --routing cache-prior --prior-strength 0.2 --warm
edge bench qwen.bundle --policy lru --policy gate --slots-per-layer 16
edge bench random.bundle --replay stock.trace.safetensors tuned.trace.safetensors --out bench.jsonl
edge bench random.bundle --overlap 0.1695 0.2156 --slots-per-layer 8 --json
"""
INTERRUPTED = 130
FORMAT = 1
_NOTE = "\nedge: stopping after the token in work; press Ctrl-C again to end at once\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge bench`."""
    add_setup_arguments(parser, policy=False)
    group = parser.add_argument_group("settings (each answers every request; the first is what others are held to)")
    add = group.add_argument
    add("--router", dest="routers", metavar="R", action="append", help="a router, by name or path (default: base)")
    add("--routing", dest="routings", choices=["stock", "cache-prior"], action="append",
        help="how each router routes (default: stock)")  # fmt: skip
    add_prior_arguments(group)
    add("--policy", dest="policies", choices=list(POLICIES), action="append",
        help=f"which expert makes room, with each router and routing (default: {EngineOptions.policy})")  # fmt: skip
    add("--replay", metavar="TRACE", type=Path, nargs="+", action="extend", default=[],
        help="recorded routing in the router's place: traces of any model of this shape")  # fmt: skip
    add("--overlap", metavar="X", type=float, nargs="+", action="extend", default=[],
        help="the same, made up: this share of a token's experts had the token before")  # fmt: skip
    work = parser.add_argument_group("requests (with --replay those of the first trace)")
    work.add_argument("--workload", metavar="W", help="as in edge profile (default: own)")
    work.add_argument("--prompts", metavar="N", type=int, default=8, help="so many of them (default: 8)")
    work.add_argument("--new-tokens", metavar="N", type=int, default=64, help="tokens per answer (default: 64)")
    work.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    work.add_argument("--download", metavar="DIR", type=Path, default=Path("out/download"), help="where workloads are")
    cache = work.add_mutually_exclusive_group()
    cache.add_argument("--cold", dest="cold", action="store_true", default=True,
                       help="no expert in memory when a request begins (default)")  # fmt: skip
    cache.add_argument("--warm", dest="cold", action="store_false",
                       help="keep what this setting's request before has left (answered twice)")  # fmt: skip
    parser.add_argument("--out", metavar="FILE.jsonl", type=Path, help="write every token of every setting")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Compare; 0, or 130 after Ctrl-C with the whole rounds until then. Raises EdgeError."""
    setup, priors = _check(args)
    traces = _load_traces(args.replay)
    from profiles.contest import Conditions, contest
    from runtime.engine import Engine

    with Engine.open(args.bundle, setup) as engine, contextlib.ExitStack() as stack:
        for line in engine.notes:
            console.note(line)
        jobs, temperature = _jobs(args, engine, traces)
        rivals = _rivals(args, engine, priors, traces, jobs)
        conditions = Conditions(args.cold, temperature)
        header = _header(engine, rivals, jobs, asdict(conditions))
        emit, interrupt = stack.enter_context(_lines(args.out)), stack.enter_context(Interrupt(note=_NOTE))
        emit({"type": "bench", "format": FORMAT, **header})
        with console.Progress(quiet=args.json, unit="answers") as progress:
            outcome = contest(
                engine, rivals, jobs, conditions, emit,
                progress=lambda done, total: progress.update("answers", done, total),
                note=console.note, stop=lambda: interrupt.requested,
            )  # fmt: skip
        if not outcome.ceilings:
            raise KeyboardInterrupt  # before every setting had answered the first request: there is nothing to compare
        report = {**header, **_results(outcome, rivals, engine.slot_bytes)}
        emit({"type": "end", **{name: value for name, value in report.items() if name not in header}})
    _print(report, args)
    return 0 if outcome.complete else INTERRUPTED


def _check(args: argparse.Namespace) -> tuple[EngineOptions, list[EngineOptions]]:
    """How the engine is opened, and the options of each router with each routing. Raises UsageError."""
    for name, least in (("prompts", 1), ("new_tokens", 2)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {least}")
    if args.replay and (args.workload or args.chat):
        raise UsageError("--workload and --chat name prompts, but with --replay the requests are those recorded")
    prior = {name: value for name, value in vars(args).items() if name.startswith("prior_") and value is not None}
    bare = argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in prior})
    setup, policies = engine_options(bare), args.policies or [EngineOptions.policy]
    if (args.replay or args.overlap) and (len(policies) > 1 or GATE in policies):
        raise UsageError("--replay and --overlap go with one --policy, and not with gate, which needs a real router")
    if (args.replay or args.overlap) and setup.prefetch is None:
        setup = dataclasses.replace(setup, prefetch=0)  # a recording cannot be guessed: no rival may have guesses then
    routes = bool(args.routers or args.routings or not (args.replay or args.overlap))
    routings = (args.routings or ["stock"]) if routes else []
    if prior and "cache-prior" not in routings:
        raise UsageError(PRIOR_NEEDS)
    options = []
    for router in args.routers or [EngineOptions.router]:
        for routing in routings:
            said = prior if routing == "cache-prior" else {}
            given = dataclasses.replace(setup, router=router, routing=routing, **said)
            options += [dataclasses.replace(given, policy=policy) for policy in policies]
    return dataclasses.replace(setup, policy=policies[0]), options


def _load_traces(paths: list[Path]) -> dict[str, Trace]:
    """By the name that a setting has. Raises UsageError."""
    from remoe.trace import Trace

    found: dict[str, Trace] = {}
    for path in paths:
        name = f"replay {path.name.removesuffix('.safetensors').removesuffix('.trace')}"
        if name in found:
            raise UsageError(f"--replay {path}: another trace has that name, too: rename one of them")
        found[name] = dataclasses.replace(Trace.load(path), logits=None, hidden=None)
    return found


def _jobs(args: argparse.Namespace, engine: Engine, traces: dict[str, Trace]) -> tuple[list[Job], float]:
    """What is answered, and at which temperature."""
    from edge.trace import encode_prompts
    from profiles.rivals import Job, random_jobs, recorded_jobs
    from profiles.workloads import load_workload
    from runtime.engine import GenerateOptions

    if traces:
        found = recorded_jobs(traces, args.prompts, args.new_tokens, engine.config, engine.context, console.note)
        return found, 0.0
    if engine.tokenizer is None and args.workload is None and not args.chat:
        console.note("the bundle has no tokenizer: prompts are random tokens, and answers are drawn at temperature 1")
        return random_jobs(args.prompts, args.new_tokens, engine.config), 1.0
    workload = load_workload(args.workload or "own", args.download)
    workload = dataclasses.replace(workload, prompts=workload.prompts[: args.prompts])
    ids = encode_prompts(engine, workload, args.chat, GenerateOptions(args.new_tokens))
    return [Job(tuple(prompt), args.new_tokens, number) for number, prompt in enumerate(ids)], 0.0


def _rivals(
    args: argparse.Namespace, engine: Engine, routed: list[EngineOptions], traces: dict[str, Trace], jobs: list[Job]
) -> list[Rival]:
    """Routers first, then recordings, then made-up ones, each in the order given. Raises UsageError."""
    from profiles.rivals import Rival, recorded_rival, synthetic_rival

    found = []
    for options in routed:
        prior = options.prior
        name = f"{options.router}, cache-prior" if prior else options.router
        name += f", {options.policy}" if len({options.policy for options in routed}) > 1 else ""
        facts = {"router": options.router, "routing": options.routing}
        found.append(Rival(name, options.router, prior, policy=options.policy, facts=facts))
    recorded = [recorded_rival(name, trace, jobs, engine.config) for name, trace in traces.items()]
    recorded += [synthetic_rival(overlap, jobs, engine.config, engine.slot_bytes) for overlap in args.overlap]
    found += [dataclasses.replace(rival, policy=engine.options.policy) for rival in recorded]
    names = [rival.name for rival in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"the setting {twice!r} is named twice: give each router, routing, policy and overlap once")
    for rival in found:
        rival.take_over(engine, 0)  # refuses a router that is not there or not of this model
    return found


@contextlib.contextmanager
def _lines(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that appends one JSON line; without a path it does nothing. Raises UsageError, EdgeError."""
    if path is None:
        yield lambda line: None
        return
    try:
        file: IO[str] = open(path, "x", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed below
    except FileExistsError:
        raise UsageError(f"--out {path} exists: a run never writes over another one; name a new file") from None
    except OSError as error:
        raise UsageError(f"--out {path}: {error.strerror}") from None

    def emit(line: dict[str, Any]) -> None:
        try:
            file.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
        except OSError as error:
            raise EdgeError(f"{path}: {error.strerror}") from None

    with file:
        yield emit


def _header(engine: Engine, rivals: list[Rival], jobs: list[Job], conditions: dict[str, Any]) -> dict[str, Any]:
    """What was compared and how, before anything was measured."""
    from runtime.machine import describe

    settings = {k: v for k, v in engine.settings().items() if k not in ("router", "routing", "policy")}
    return {
        "bundle": str(engine.bundle.path),
        "engine": settings,
        "conditions": conditions,
        "order": "every request under each setting in turn",
        "requests": [{"prompt_tokens": len(job.prompt), "new_tokens": job.new_tokens} for job in jobs],
        "names": [rival.name for rival in rivals],
        "machine": describe(),
    }


def _results(outcome: Outcome, rivals: list[Rival], blob_bytes: int) -> dict[str, Any]:
    from profiles.contest import ceiling_figures, figures, reductions

    found, less = figures(outcome, blob_bytes), reductions(outcome)
    settings = []
    for rival in rivals:
        facts = {**rival.facts, "policy": rival.policy, **({"prior": str(rival.prior)} if rival.prior else {})}
        than_first = {name: asdict(value) for name, value in less.get(rival.name, {}).items()} or None
        settings.append({"name": rival.name, **facts, **found[rival.name], "less_than_first": than_first})
    return {"complete": outcome.complete, "settings": settings, "ceiling": ceiling_figures(outcome)}


def _print(report: dict[str, Any], args: argparse.Namespace) -> None:
    if report["complete"]:
        whole = f"{len(report['requests'])} requests"
    else:
        whole = f"interrupted: {report['settings'][0]['requests']} of {len(report['requests'])} requests"
    cache = "cold" if report["conditions"]["cold"] else "warm"
    slots = report["engine"]["slots_per_layer"] or f"{report['engine']['slots']} shared"
    title = f"{args.bundle}: {whole}, {cache} cache of {slots} slots per layer"
    show = console.table if args.json else lambda rows, title: print(console.format_table(rows, title))
    show(table_rows(report["settings"]), title)
    console.note(ceiling_line(report["ceiling"]))
    for why in sorted({less["why"] for s in report["settings"] if (less := tpot_less(s)) and less["why"]}):
        console.note(f"no interval: {why}")
    if args.json:
        console.print_json(report)
