"""`edge trace`: the routing of a model's own answers, or of text that it reads, into one file."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edge import console
from edge.interrupt import Interrupt
from edge.options import add_engine_arguments, add_generate_arguments, engine_options, generate_options, note_greedy
from runtime.errors import UsageError

if TYPE_CHECKING:
    from profiles.workloads import Workload
    from remoe.record import Watcher
    from remoe.trace import Block, Trace
    from runtime.engine import Engine, GenerateOptions

NAME = "trace"
HELP = "record which experts every token is sent to"
EXAMPLES = """
edge trace qwen.bundle --prompt "Why is the sky blue?" --out sky.trace.safetensors
edge trace qwen.bundle --workload sharegpt --prompts 128 --max-new-tokens 64 --ignore-eos --out chats.trace.safetensors
edge trace qwen.bundle --text book.txt --tokens 8192 --logits --hidden --out book.trace.safetensors
edge simulate chats.trace.safetensors --slots 8 16 30
"""
INTERRUPTED = 130
_OF_ANSWERS = (
    "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop", "ignore_eos",
)  # fmt: skip
_NOTE = "\nedge: stopping after the token in work; press Ctrl-C again to end at once, with nothing written\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge trace`."""
    add_engine_arguments(parser)
    group = parser.add_argument_group("what is recorded")
    add_sources(group)
    add = group.add_argument
    add("--out", metavar="FILE", type=Path, required=True, help="the trace, NAME.trace.safetensors by custom")
    add("--logits", action="store_true", help="all gate logits, too: cache-prior in edge simulate needs them")
    add("--hidden", action="store_true", help="the routers' inputs, too: edge tune --from-trace needs them")
    add("--cache", choices=["cold", "warm"], default="cold", help="cold: emptied before each request (default)")
    add_generate_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def add_sources(group: argparse._ArgumentGroup) -> None:
    """Where prompts or texts come from."""
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="one prompt that is answered")
    source.add_argument("--workload", metavar="W", help="prompts that are answered: as in edge profile")
    source.add_argument("--text", metavar="FILE", type=Path, nargs="+",
                        help="text that is read, not continued: .txt, or .jsonl with one per line")  # fmt: skip
    group.add_argument("--prompts", metavar="N", type=int, help="only so many of the workload")
    group.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    group.add_argument("--window", metavar="N", type=int,
                       help="tokens of text per request (default: 512, or the context)")  # fmt: skip
    group.add_argument("--tokens", metavar="N", type=int, help="so many tokens of text in all")
    group.add_argument("--download", metavar="DIR", type=Path, default=Path("out/download"), help="where workloads are")


def run(args: argparse.Namespace) -> int:
    """Record; 0, or 130 after Ctrl-C with the requests until then. Raises EdgeError."""
    options, prompts = generate_options(args), load_prompts(args)
    note_greedy(args, options)
    from remoe.record import choice_bias, info_of, watching
    from remoe.trace import Origin, Trace, TraceWriter
    from remoe.windows import text_windows
    from runtime.engine import Engine

    with Engine.open(args.bundle, engine_options(args)) as engine, Interrupt(note=_NOTE) as interrupt:
        for line in engine.notes:
            console.note(line)
        if prompts is None:
            requests, origin = text_windows(engine, args.text, args.window, args.tokens)
        else:
            requests, origin = encode_prompts(engine, prompts, args.chat, options), Origin(prompts.name, prompts.sha256)
        info = info_of(engine, "teacher-forced" if prompts is None else "generated", origin)
        with (
            TraceWriter(args.out, info, choice_bias(engine)) as writer,
            watching(engine, args.logits, args.hidden) as watcher,
            console.Progress(quiet=args.json, unit="requests") as progress,
        ):
            for done, block in enumerate(_blocks(engine, watcher, requests, args, options, interrupt), 1):
                if block is not None:
                    writer.add(block)
                progress.update("requests", done, len(requests))
    trace = Trace.load(args.out)
    _report(trace, args)
    return INTERRUPTED if interrupt.requested else 0


def load_prompts(args: argparse.Namespace) -> Workload | None:
    """The prompts that the arguments name, None where they name a text to read. Raises UsageError."""
    from profiles.workloads import Prompt, Workload, load_workload

    if args.text:
        for name in ("prompts", "chat", *_OF_ANSWERS):
            if getattr(args, name) is not None and getattr(args, name) is not False:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} is for prompts, but --text is read as it is: leave one of them out")
        return None
    for name in ("window", "tokens"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} is for --text, which is read in windows: leave it out")
    if args.prompt is not None:
        if args.prompts is not None:
            raise UsageError("--prompts chooses from a --workload, but --prompt is a single one: leave one of them out")
        return Workload("prompt", "the command line", "yours", (Prompt("1", args.prompt),))
    if args.prompts is not None and args.prompts < 1:
        raise UsageError(f"--prompts {args.prompts}: expected at least 1")
    workload = load_workload(args.workload, args.download)
    return dataclasses.replace(workload, prompts=workload.prompts[: args.prompts])


def encode_prompts(engine: Engine, workload: Workload, chat: bool, options: GenerateOptions) -> list[list[int]]:
    """Prompts as token ids; those that leave no room for the answer are left out, which is told."""
    found = [_prompt_ids(engine, prompt.text, chat) for prompt in workload.prompts]
    fitting = [ids for ids in found if len(ids) + options.max_new_tokens <= engine.context]
    if len(fitting) < len(found):
        console.note(f"{len(found) - len(fitting)} prompts are too long for a context of {engine.context}: left out")
    if not fitting:
        raise UsageError(f"no prompt and answer fit into a context of {engine.context}: use --context")
    return fitting


def _prompt_ids(engine: Engine, text: str, chat: bool) -> list[int]:
    if not chat:
        return engine.encode(text)
    if engine.tokenizer is None:
        raise UsageError(f"{engine.bundle.path} has no tokenizer, so no chat template")
    return engine.tokenizer.apply_chat([{"role": "user", "content": text}])


def _blocks(
    engine: Engine, watcher: Watcher, requests: list[list[int]], args: argparse.Namespace, options: GenerateOptions,
    interrupt: Interrupt,
) -> Iterator[Block | None]:  # fmt: skip
    from remoe.record import record_generation, record_text

    stepwise = engine.options.prior is not None
    for number, ids in enumerate(requests):
        if interrupt.requested:
            return
        if args.cache == "cold":
            engine.empty_cache()
        if args.text:
            yield record_text(engine, watcher, number, ids, stepwise)
        else:
            yield record_generation(engine, watcher, number, ids, options, lambda: interrupt.requested)


def _report(trace: Trace, args: argparse.Namespace) -> None:
    from remoe.metrics import expert_overlap

    requests, size = len(trace.request_rows()), args.out.stat().st_size
    overlap = expert_overlap(trace)
    rows = [
        ["requests", f"{requests} ({trace.info.kind}, {trace.info.source.name})"],
        ["tokens", f"{len(trace)}, {int(trace.decode.sum())} of them decode steps"],
        ["routing", f"{trace.info.routing}, router {trace.info.router.name}"],
        ["overlap", "-" if overlap is None else f"{overlap:.4f} of a token's experts had the token before"],
        ["file", f"{args.out}, {console.format_bytes(size)}"],
    ]
    console.table(rows)
    if args.json:
        figures = {"requests": requests, "tokens": len(trace), "decode_tokens": int(trace.decode.sum())}
        console.print_json({"path": str(args.out), "bytes": size, **figures, "overlap": overlap})
