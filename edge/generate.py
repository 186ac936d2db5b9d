"""`edge generate`: text on stdout as it is made, notes and one table of figures on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edge import console
from edge.answer import print_answer
from edge.interrupt import Interrupt
from edge.options import (
    add_engine_arguments,
    add_generate_arguments,
    argument,
    engine_options,
    generate_options,
    note_greedy,
)
from edge.report import summary_rows
from runtime.errors import UsageError

if TYPE_CHECKING:
    from runtime.engine import Engine, GenerateOptions

NAME = "generate"
HELP = "stream text from a bundle"
EXAMPLES = """
edge generate qwen.bundle --prompt "The capital of France is"
edge generate qwen.bundle --chat --prompt "Why is the sky blue?" --temperature 0.7 --seed 1
edge generate qwen.bundle --prompt-file question.txt --expert-memory 4GiB --record run.jsonl
echo "Once upon a time" | edge generate qwen.bundle --max-new-tokens 64 --json
edge generate tiny.bundle --prompt-ids 1,2,3
"""
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The prompt, then what `chat` has as well."""
    add_engine_arguments(parser)
    group = parser.add_argument_group("prompt (or on stdin; one final newline is no part of it)")
    prompt = group.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the text; - reads it from stdin")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with the text; - is stdin")
    prompt.add_argument("--prompt-ids", metavar="1,2,3", type=argument(_parse_ids), help="token ids, taken as they are")
    group.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    group.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    add_generate_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of the text")


def run(args: argparse.Namespace) -> int:
    """Generate; 0, or 130 after Ctrl-C. Raises EdgeError."""
    options = generate_options(args)
    note_greedy(args, options)
    prompt = _read_prompt(args)
    from runtime.engine import Engine

    with Engine.open(args.bundle, engine_options(args)) as engine:
        for line in engine.notes:
            console.note(line)
        ids = _chat_ids(engine, prompt, args.system) if args.chat else prompt
        complete = _generate(engine, ids, options, silent=args.json)
        report = engine.report()
        console.table(summary_rows(report))
        if args.json:
            console.print_json(report)
    return 0 if complete else INTERRUPTED


def _generate(engine: Engine, prompt: str | Sequence[int], options: GenerateOptions, silent: bool) -> bool:
    """Print the answer; False when Ctrl-C ended it."""
    with Interrupt(at_once=True) as interrupt:
        try:
            print_answer(engine, prompt, options, interrupt, silent)
        except KeyboardInterrupt:
            pass  # what there is gets reported, and the exit code tells
    return not interrupt.requested


def _read_prompt(args: argparse.Namespace) -> str | list[int]:
    if args.system is not None and not args.chat:
        raise UsageError("--system needs --chat: without a chat template there is no system message")
    if args.prompt_ids is not None:
        if args.chat:
            raise UsageError("--chat needs a text, but --prompt-ids gives token ids: leave one of them out")
        ids: list[int] = args.prompt_ids
        return ids
    if args.prompt is not None and args.prompt != "-":
        text: str = args.prompt
        return text
    if args.prompt_file is not None and args.prompt_file != "-":
        return _read_file(Path(args.prompt_file))
    if args.prompt is None and args.prompt_file is None and sys.stdin.isatty():
        raise UsageError(
            "there is no prompt: give --prompt TEXT, --prompt-file FILE or --prompt-ids 1,2,3, or pipe one in"
        )
    return _as_text(sys.stdin.buffer.read(), "stdin")


def _read_file(path: Path) -> str:
    try:
        return _as_text(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"--prompt-file {path}: {error.strerror}") from None


def _as_text(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source}: not UTF-8 text (byte {error.start} is {data[error.start]:#04x})") from None


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"{text!r:.80} is not a list of token ids like 1,2,3") from None


def _chat_ids(engine: Engine, prompt: str | list[int], system: str | None) -> list[int]:
    if engine.tokenizer is None:
        raise UsageError(f"{engine.bundle.path} has no tokenizer: give token ids with --prompt-ids, without --chat")
    messages = [{"role": "system", "content": system}] if system is not None else []
    return engine.tokenizer.apply_chat([*messages, {"role": "user", "content": str(prompt)}])
