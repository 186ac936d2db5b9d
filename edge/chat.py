"""`edge chat`: a conversation with a bundle; the whole of it is the prompt of each answer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edge import console
from edge.answer import print_answer
from edge.interrupt import Interrupt, Terminated
from edge.options import add_engine_arguments, add_generate_arguments, engine_options, generate_options, note_greedy
from edge.report import summary_rows
from runtime.errors import UsageError

if TYPE_CHECKING:
    from runtime.engine import Engine, GenerateOptions
    from runtime.text import Tokenizer

NAME = "chat"
HELP = "talk to a bundle"
EXAMPLES = """
edge chat qwen.bundle
edge chat qwen.bundle --system "You answer in one sentence." --expert-memory 4GiB
printf 'Hello\\nAnd you?\\n' | edge chat qwen.bundle --temperature 0
"""
COMMANDS = "/reset forgets the conversation, /stats shows the last answer's figures, /exit or Ctrl-D leaves"
_STOPPING = "\nedge: stopping after this token; Ctrl-C again ends the program\n"
_SAMPLED = ("temperature", "top_k", "top_p")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `generate` without its prompt."""
    add_engine_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message of the conversation")
    add_generate_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Talk until /exit or end of input. Raises EdgeError."""
    generate_options(args)  # wrong values are refused before anything is loaded
    from runtime.engine import Engine

    with Engine.open(args.bundle, engine_options(args)) as engine:
        for line in engine.notes:
            console.note(line)
        tokenizer = _tokenizer(engine)
        defaults = model_defaults(tokenizer.generation_defaults)
        if defaults:
            words = ", ".join(f"{name} {value}" for name, value in defaults.items())
            console.note(f"text: the model's own defaults where nothing else is asked for: {words}")
        options = generate_options(args, defaults)
        note_greedy(args, options)
        console.note(COMMANDS)
        Conversation(engine, tokenizer, options, args.system).talk()
    return 0


class Conversation:
    """The messages so far, and the loop that adds to them."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, options: GenerateOptions, system: str | None) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._options = replace(options, reuse_prefix=True)
        self._opening = [{"role": "system", "content": system}] if system is not None else []
        self._messages = list(self._opening)

    def talk(self) -> None:
        """Read lines until there are no more."""
        while (line := _read_line()) is not None:
            word = line.strip()
            if word == "/exit":
                return
            if word == "/reset":
                self._messages = list(self._opening)
                console.note("the conversation is forgotten")
            elif word == "/stats":
                self._show_stats()
            elif word.startswith("/"):
                console.note(f"unknown command {word.split()[0]}: {COMMANDS}")
            elif word:
                self._answer(line)

    def _answer(self, line: str) -> None:
        messages = [*self._messages, {"role": "user", "content": line}]
        try:
            with Interrupt(note=_STOPPING) as interrupt:
                ids = self._tokenizer.apply_chat(messages)
                text = print_answer(self._engine, ids, self._options, interrupt)
        except UsageError as error:
            # A conversation outgrows the context sooner or later: that ends the conversation, not the program.
            console.error(f"{error}\n  /reset starts a new conversation")
            return
        self._messages = [*messages, {"role": "assistant", "content": text}]
        if interrupt.terminated:
            raise Terminated

    def _show_stats(self) -> None:
        try:
            console.table(summary_rows(self._engine.report()))
        except UsageError as error:
            console.note(str(error))


def model_defaults(defaults: Mapping[str, Any]) -> dict[str, float | int]:
    """Of a checkpoint's generation defaults those that our options know and that are numbers.

    Temperature and its kin count only where the checkpoint means its text to be sampled.
    """
    names = ["repetition_penalty"] + (list(_SAMPLED) if defaults.get("do_sample") is True else [])
    found = {name: defaults[name] for name in names if name in defaults}
    if defaults.get("do_sample") is True:
        found.setdefault("temperature", 1.0)  # what transformers takes where it is not written
    return {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _tokenizer(engine: Engine) -> Tokenizer:
    tokenizer = engine.tokenizer
    if tokenizer is None or not tokenizer.has_chat_template:
        missing = "tokenizer" if tokenizer is None else "chat template"
        raise UsageError(
            f"{engine.bundle.path} has no {missing}, so it cannot hold a conversation\n  run: edge generate --help"
        )
    return tokenizer


def _read_line() -> str | None:
    """One line of the person; None at the end of input. Ctrl-C clears the line."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 - gives input() a history and editing
    while True:
        try:
            return input("> " if terminal else "")
        except EOFError:
            return None
        except KeyboardInterrupt as error:
            if not terminal or isinstance(error, Terminated):
                raise
            print(file=sys.stderr)  # leave the line that was begun
            console.note("/exit or Ctrl-D leaves")
