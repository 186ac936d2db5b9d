"""SIGTERM ends the program like Ctrl-C does, with the record closed and the exit code that a shell expects."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edge import cli, verify
from edge.interrupt import Interrupt, Terminated, Termination
from export.exporter import export_bundle
from tests.checkpoints import make_checkpoint

EDGE = [sys.executable, "-m", "edge"]


def terminate(*_: object) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    return 0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can speak for longer than the tests wait."""
    folder = tmp_path_factory.mktemp("terminate")
    sizes = {"vocab_size": 300, "num_hidden_layers": 2, "max_position_embeddings": 60_000}
    checkpoint = make_checkpoint(folder / "checkpoint", "qwen2_moe", tokenizer=True, **sizes)
    export_bundle(checkpoint, folder / "bundle")
    return folder / "bundle"


def test_a_command_that_waits_for_nothing_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "run", terminate)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["verify", "x"]) == 143
    assert capsys.readouterr().err == "edge: error: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_that_was_interrupted_by_it_has_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> int:
        with Interrupt() as interrupt:
            terminate()
        return 130 if interrupt.requested else 0

    monkeypatch.setattr(verify, "run", run)
    assert cli.main(["verify", "x"]) == 143


def test_the_second_one_does_not_wait() -> None:
    with Termination() as termination, Interrupt(note="not for a program that ends") as interrupt:
        terminate()
        assert (interrupt.requested, interrupt.terminated, termination.received) == (True, True, True)
        with pytest.raises(Terminated):
            terminate()


def test_ctrl_c_is_still_told_apart() -> None:
    with Termination() as termination, Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
    assert (interrupt.requested, interrupt.terminated, termination.received) == (True, False, False)


def test_other_threads_may_run_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "run", lambda _: 0)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["verify", "x"])))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["chat"]], ids=["generate", "chat"])
def test_a_running_program_closes_its_record(bundle: Path, tmp_path: Path, command: list[str]) -> None:
    name, *words = command
    record = tmp_path / "r.jsonl"
    words += ["--max-new-tokens", "50000", "--context", "60000", "--ignore-eos", "--record", str(record)]
    process = subprocess.Popen(
        [*EDGE, name, str(bundle), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    assert process.stdout.read(1)  # it speaks, and would for a minute
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert b"Traceback" not in errors
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert (lines[0]["type"], lines[-1]["type"]) == ("run", "end")
    assert lines[-1]["finish_reason"] == "interrupted"
    assert 1 < len(lines) - 1 < 50_000
