"""The `edge` command: find the subcommand, run it, turn what went wrong into one message and an exit code.

A subcommand is a module edge/NAME.py with `NAME`, `HELP` (one line), `EXAMPLES` (runnable lines),
`add_arguments(parser)` and `run(args) -> int`. It is imported only when it is chosen: `edge --help` answers at once.

Exit codes: 0 done, 1 something failed, 2 the request cannot be carried out as it stands, 130 interrupted,
143 terminated.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, cast

from edge import console
from edge.interrupt import Termination
from runtime import __version__
from runtime.errors import EdgeError, UsageError

COMMANDS = {
    "export": "turn a Hugging Face checkpoint into a bundle",
    "inspect": "show what a bundle contains and what it needs",
    "verify": "check every file of a bundle",
    "engines": "build the TensorRT engines of a bundle, for this machine only",
    "doctor": "check this machine: memory, disk, back-ends",
    "generate": "stream text from a bundle",
    "chat": "talk to a bundle",
    "calibrate": "measure this machine into a device profile",
    "tune": "tune the routers of a checkpoint for reuse of experts",
    "trace": "record which experts every token is sent to",
    "simulate": "replay recorded routing through caches of any size and policy",
    "eval": "judge routers: quality against the stock router, and what they read",
    "forecast": "tell from a config whether a model fits a board, and how fast it can be at best",
    "profile": "measure tokens over a workload, with power and temperature beside them",
    "bench": "compare routers, routing rules, policies and recorded routing of one bundle in one interleaved run",
    "report": "turn runs of edge profile into one HTML page",
    "tegrastats": "turn a tegrastats log into JSON lines or a summary",
}
MODULES = {"report": "report_html"}  # a subcommand whose module has another name
INTERRUPTED, TERMINATED = 130, 143  # what a shell reports for a program that Ctrl-C or SIGTERM ended
_BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended

_EXAMPLES = """\
  edge doctor                                        is this machine fit?
  edge export ./Qwen1.5-MoE-A2.7B qwen.bundle        checkpoint to bundle
  edge generate qwen.bundle --prompt "Hello" --expert-memory 4GiB
  edge chat qwen.bundle"""
_DESCRIPTION = "Mixture-of-experts inference on small devices: experts stream from disk through a cache of fixed size."


class Command(Protocol):
    """What a subcommand module offers."""

    NAME: str
    HELP: str
    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UsageErrors, like all others, and whose help opens with runnable examples."""

    examples = ""

    def format_help(self) -> str:
        return f"examples:\n{self.examples}\n\n{super().format_help()}"

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse swallows the error of a help that cannot be written

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n  run: {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `edge` with `argv` (default: the process's arguments) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    with Termination() as termination:
        code = _guarded(words, termination)
    return TERMINATED if code == INTERRUPTED and termination.received else code


def _guarded(words: list[str], termination: Termination) -> int:
    """Run the command; whatever it raises becomes one message and an exit code."""
    debug = "--debug" in words
    try:
        code = _dispatch(words)
        sys.stdout.flush()  # argparse ends after --help: a reader that went away would be met only at exit
        return code
    except KeyboardInterrupt:
        console.error("terminated" if termination.received else "interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()  # its reader went away
        return _BROKEN_PIPE
    except EdgeError as error:
        if debug:
            traceback.print_exc()
        console.error(str(error))
        return error.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, OSError):
            _drop_unwritable_output()
        console.error(_unexpected(error, debug))
        return 1


def main_entry() -> NoReturn:
    """The installed command."""
    _reopen_closed_streams()
    _spin_briefly()
    sys.exit(main())


def _spin_briefly() -> None:
    """Before torch is loaded: its threads wait for each other by spinning, for some 15 ms on x86, where a turn of that
    loop takes a hundred cycles. So long a neighbour waits for the core, and so long does the thread that the neighbour
    holds up: beside busy programs the demo took 4 s per token, with half a millisecond 0.3. On an idle machine that
    costs 10 % where torch computes a token by itself, and nothing with the compiled kernel.
    """
    if platform.machine() == "x86_64" and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _reopen_closed_streams() -> None:
    """A stream that whoever started us has closed is None, and the next file that is opened would get its number.

    Input is then empty and talk goes nowhere; output, where results belong, fails when it is written to.
    """
    for name, flags, mode in (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode, encoding="utf-8"))


def _drop_unwritable_output() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()


def _drop_output() -> None:
    """What is still buffered for stdout must not raise again, now or at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(words: list[str]) -> int:
    parser = _top_parser()
    # Everything after the subcommand's name belongs to it: the two parsers never see each other's options.
    at = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    try:
        parser.parse_args(words[:at])
        if at == len(words):
            parser.print_help()
            return 2 if not words else 0
        return _run_command(words[at], words[at + 1 :])
    except SystemExit as done:  # --help and --version
        return done.code if isinstance(done.code, int) else 0


def _run_command(name: str, words: list[str]) -> int:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        guess = f", did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"unknown command {name!r}{guess} (known: {', '.join(COMMANDS)})\n  run: edge --help")
    command = cast(Command, importlib.import_module(f"edge.{MODULES.get(name, name)}"))
    parser = Parser(
        prog=f"edge {name}",
        description=command.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.examples = _indented(command.EXAMPLES)
    command.add_arguments(parser)
    parser.usage = f"%(prog)s {_places(parser)}[options]"  # argparse would list every option before them
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command.run(parser.parse_args(words))


def _top_parser() -> Parser:
    commands = "\n".join(f"  {name:10} {line}" for name, line in COMMANDS.items())
    parser = Parser(
        prog="edge",
        usage="edge COMMAND ...",
        description=_DESCRIPTION,
        epilog=f"commands:\n{commands}\n\nrun 'edge COMMAND --help' for the options of one",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.examples = _EXAMPLES
    parser.add_argument("--version", action="version", version=f"remoe-edge {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _places(parser: argparse.ArgumentParser) -> str:
    """The positional arguments as a usage line writes them."""
    found = [action for action in parser._actions if not action.option_strings]
    names = [(str(action.metavar or action.dest), action.nargs == "?") for action in found]
    return "".join(f"[{name}] " if optional else f"{name} " for name, optional in names)


def _indented(examples: str) -> str:
    return "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())


def _unexpected(error: Exception, debug: bool) -> str:
    hint = "" if debug else "\n  run again with --debug to see where"
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or "standard output, or a file that was being written"  # a write names no file
        return f"{error.strerror}: {where}{hint}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the Python package {error.name!r} is not installed for {sys.executable}\n  run: make venv"
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"unexpected {text}{hint}"
