"""The front door: finding commands, saying errors, exit codes, sizes and tables."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from edge import cli, console, verify
from edge.console import format_bytes, format_table, parse_size
from runtime.errors import BudgetError, EdgeError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(verify, "run", run)


def test_help_and_version_need_no_torch() -> None:
    """`edge --help` on a board took seconds when a subcommand's imports crept in."""
    code = (
        "import sys; from edge.cli import main; codes = [main(['--help']), main(['--version'])];"
        "heavy = {'torch', 'numpy', 'onnx', 'rich', 'jinja2'} & set(sys.modules);"
        "assert not heavy and codes == [0, 0], heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("examples:\n  edge doctor")
    assert done.stdout.endswith("remoe-edge 0.1.0\n")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere spinning is short by itself")
@pytest.mark.parametrize(
    ("given", "count"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_threads_of_torch_spin_briefly_unless_told(given: dict[str, str], count: str) -> None:
    """Told by the library of threads that torch itself has loaded."""
    code = "from edge import cli; cli._spin_briefly(); import torch"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    environment |= given | {"OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert f"GOMP_SPINCOUNT = '{count}'" in done.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_that_opens_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"edge.{cli.MODULES.get(name, name)}")
    assert name == module.NAME
    assert cli.COMMANDS[name] == module.HELP
    assert cli.main([name, "--help"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "examples:"
    assert f"edge {name}" in second


def test_no_command_prints_the_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exprt"], "edge: error: unknown command 'exprt', did you mean 'export'? (known: export, inspect"),
        (["--verbose", "verify"], "edge: error: unrecognized arguments: --verbose\n  run: edge --help"),
        (["verify"], "edge: error: the following arguments are required: BUNDLE\n  run: edge verify --help"),
        (["verify", "x", "--qui"], "edge: error: unrecognized arguments: --qui"),  # no abbreviations: words are stable
        (["generate", "x", "--top-k", "a"], "edge: error: argument --top-k: invalid int value: 'a'"),
        (
            ["generate", "x", "--expert-memory", "4 apples"],
            "edge: error: argument --expert-memory: '4 apples' is not a",
        ),
        (["generate", "x", "--prompt", "a", "--prompt-ids", "1"], "not allowed with argument --prompt"),
        (["generate", "x", "--backend", "vulkan"], "invalid choice: 'vulkan'"),
    ],
)
def test_wrong_words_exit_2_and_say_what_to_run(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("no such thing"), 2, "edge: error: no such thing\n"),
        (BudgetError("1 + 1 = 2"), 2, "edge: error: 1 + 1 = 2\n"),
        (EdgeError("the disk failed"), 1, "edge: error: the disk failed\n"),
        (
            PermissionError(13, "Permission denied", "/x"),
            1,
            "edge: error: Permission denied: /x\n  run again with --debug",
        ),
        (
            ZeroDivisionError("by zero"),
            1,
            "edge: error: unexpected ZeroDivisionError: by zero\n  run again with --debug",
        ),
        (
            ModuleNotFoundError("No module named 'x'", name="x"),
            1,
            "edge: error: the Python package 'x' is not installed",
        ),
        (KeyboardInterrupt(), 130, "edge: error: interrupted\n"),
    ],
)
def test_errors_become_one_message_and_an_exit_code(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, error)
    assert cli.main(["verify", "x"]) == code
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("words", [["--debug", "verify", "x"], ["verify", "x", "--debug"]])
def test_debug_shows_where(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, EdgeError("the disk failed"))
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.endswith("edge: error: the disk failed\n")


def test_a_reader_that_goes_away_is_no_crash() -> None:
    done = subprocess.run(
        f"{sys.executable} -m edge --help | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 141)  # 0 when the text was gone before the reader was
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("512M", 512 << 20), ("2GiB", 2 << 30), ("1.5 g", 3 << 29), ("2GB", 2_000_000_000), ("1k", 1024)],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1.2.3M", "0", "9999999T", "4 MB/s", "nan", "0x10"])
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (17_301_504, "16.5 MiB"),
        (1023 << 20, "1023 MiB"),
        (5 << 30, "5.00 GiB"),
    ],
)
def test_sizes_as_people_read_them(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_tables_align_their_columns() -> None:
    assert format_table([["a", "bb", "c"], ["long", "b"]], "title") == "title\n  a     bb  c\n  long  b"


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress() as progress:
        progress.update("experts", 1, 2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("words", ["--help", "verify --help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_an_error_told_once(words: str, unbuffered: str) -> None:
    done = subprocess.run(
        f"exec {sys.executable} -m edge {words} > /dev/full", shell=True, cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        "edge: error: No space left on device: standard output, or a file that was being written\n"
        "  run again with --debug to see where\n"
    )


def test_streams_that_were_closed_are_no_crash(tmp_path: Path) -> None:
    def run(words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            f"exec {sys.executable} -m edge {words}", shell=True, cwd=ROOT, capture_output=True, text=True, check=False
        )  # fmt: skip

    closed = run("verify --help >&-")  # a result that went nowhere was not given
    assert (closed.returncode, closed.stdout) == (1, "")
    assert "Bad file descriptor: standard output" in closed.stderr and "Traceback" not in closed.stderr
    silent = run(f"verify {tmp_path / 'none'} 2>&-")  # talk must not end up among the results
    assert (silent.returncode, silent.stdout, silent.stderr) == (2, "", "")
    empty = run("tegrastats - <&-")
    assert empty.returncode == 2
    assert "no line of tegrastats" in empty.stderr
