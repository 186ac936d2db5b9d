"""What commands refuse before they work for a minute: options without effect, places that cannot be written, damage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edge import calibrate
from edge.cli import main
from export.exporter import export_bundle
from export.settings import ExportOptions
from remoe.trace_writer import TraceWriter
from tests.checkpoints import make_checkpoint
from tests.traces import written_trace


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    checkpoint = make_checkpoint(folder / "ck", "qwen2_moe", tokenizer=True, vocab_size=300, num_hidden_layers=2)
    export_bundle(checkpoint, folder / "bundle", ExportOptions(graphs=()))
    return folder / "bundle"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trace", "--text", "{text}", "--max-new-tokens", "4"], "--max-new-tokens is for prompts, but --text"),
        (["trace", "--text", "{text}", "--temperature", "0"], "--temperature is for prompts, but --text"),
        (["trace", "--text", "{text}", "--ignore-eos"], "--ignore-eos is for prompts, but --text"),
        (["trace", "--prompt", "a", "--tokens", "4"], "--tokens is for --text"),
        (["trace", "--prompt", "a", "--window", "4"], "--window is for --text"),
        (["trace", "--prompt", "a", "--prompts", "4"], "--prompts chooses from a --workload"),
        (["trace", "--prompt", "a", "--out", "{here}"], "is a folder: name a file in it"),
        (["eval", "--text", "{text}", "--limit", "4"], "--limit goes with --tasks, not with --text"),
        (["eval", "--text", "{text}", "--task-folder", "x"], "--task-folder goes with --tasks, not with --text"),
        (["eval", "--text", "{text}", "--prompts", "4"], "--prompts goes with --workload, not with --text"),
        (["eval", "--tasks", "x", "--slots", "4"], "--slots goes with --text or --workload, not with --tasks"),
        (["eval", "--tasks", "x", "--segment", "16"], "--segment goes with --text or --workload, not with --tasks"),
        (["eval", "--tasks", "x", "--limit", "0"], "--limit 0: expected at least 1"),
        (["eval", "--workload", "own", "--prompts", "0"], "--prompts 0: expected at least 1"),
        (["eval", "--text", "{text}", "--save-traces", "{text}"], "is no folder that can be written to"),
        (["eval", "--text", "{text}", "--save-traces", "{text}/a/b"], "is no folder that can be written to"),
        (["profile", "--settle", "nan"], "--settle nan: expected seconds from 0 on"),
        (["profile", "--settle", "-1"], "--settle -1.0: expected seconds from 0 on"),
        (["profile", "--workload", "gsm8k", "--download", "{text}"], "downloads cannot be kept there"),
    ],
)
def test_before_the_bundle_is_opened(
    words: list[str], message: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a text " * 20)
    command, *options = [word.format(text=tmp_path / "a.txt", here=tmp_path) for word in words]
    out = [] if command == "eval" or "--out" in options else ["--out", str(tmp_path / "out")]
    assert main([command, str(bundle), "--slots-per-layer", "8", *options, *out]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert os.listdir(tmp_path) == ["a.txt"]


def test_simulate_knows_no_optimum_for_routing_that_depends_on_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "t.trace.safetensors"
    written_trace([[[0, 1], [2, 3]]] * 4, 6).save(trace)
    assert main(["simulate", str(trace), "--routing", "cache-prior", "--policy", "belady"]) == 2
    shown = capsys.readouterr()
    assert "--policy belady must know what will be asked for" in shown.err
    assert shown.out == ""


def test_simulate_tells_what_is_named_twice_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.trace.safetensors"
    written_trace([[[0, 1], [2, 3]]] * 4, 6).save(trace)
    assert main(["simulate", str(trace), "--slots", "4", "4", "3", "--policy", "lru", "fifo", "lru", "--json"]) == 0
    found = [(row["policy"], row["slots"]) for row in json.loads(capsys.readouterr().out)["results"]]
    assert found == [("lru", 4), ("fifo", 4), ("lru", 3), ("fifo", 3)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "{here}.toml"], "is a folder: name a file in it"),
        (["--out", "{here}/none/a.toml"], "is no folder that can be written to"),
        (["--threads", "0"], "--threads 0: expected at least 1"),
    ],
)
def test_calibrate_refuses_before_it_measures(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "calibrate", lambda *_: pytest.fail("it measured"))
    here = tmp_path / "d"
    here.with_suffix(".toml").mkdir()
    assert main(["calibrate", str(tmp_path), *[word.format(here=here) for word in words]]) == 2
    assert message in capsys.readouterr().err


def test_a_log_without_a_reading_gives_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.log").write_text("# nothing\n")
    assert main(["tegrastats", str(tmp_path / "a.log")]) == 2
    shown = capsys.readouterr()
    assert "no line of tegrastats in it" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("name", ["tokens.jsonl", "telemetry.jsonl"])
def test_a_run_damaged_to_bytes_is_named(
    name: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["--prompts", "1", "--new-tokens", "2", "--slots-per-layer", "8", "--telemetry", "none"]
    assert main(["profile", str(bundle), "--out", str(run), *words]) == 0
    (run / name).write_bytes(b"\xd7\x00\xff\n")
    capsys.readouterr()
    assert main(["report", str(run)]) == 2
    assert f"{name}: not UTF-8 text" in capsys.readouterr().err


def test_figures_that_cannot_be_saved_are_a_mistake_in_png(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["--prompts", "1", "--new-tokens", "3", "--slots-per-layer", "8", "--telemetry", "none"]
    assert main(["profile", str(bundle), "--out", str(run), *words]) == 0
    assert main(["report", str(run), "--png", str(run / "run.json")]) == 2
    assert f"--png {run / 'run.json'}: File exists" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_a_full_disk_names_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The disk is full when buffered arrays are written, which is as late as when they are put together."""
    from runtime.errors import EdgeError

    trace = written_trace([[[0, 1], [2, 3]]] * 4, 6)
    path = tmp_path / "t.trace.safetensors"
    with pytest.raises(EdgeError, match="t.trace.safetensors: cannot be written: No space left"):  # noqa: SIM117
        with TraceWriter(path, trace.info) as writer:
            full = open("/dev/full", "wb")  # noqa: SIM115 - closed by the writer
            full.write(b"x")
            writer._parts["experts"], writer._shapes["experts"] = full, ("uint8", (2, 2))
            writer._count = 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("option", ["--threads", "--read-threads"])
def test_more_threads_than_a_machine_can_have_are_refused(
    option: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(bundle), "--prompt", "a", option, "100000"]) == 2
    assert f"{option} 100000: expected at most 1024" in capsys.readouterr().err


def test_options_of_drawing_are_not_ignored_in_silence(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(bundle), "--slots-per-layer", "8", "--prompt", "a", "--max-new-tokens", "1"]
    told = "--top-k and --seed change nothing at temperature 0"
    assert main([*words, "--top-k", "5", "--seed", "3"]) == 0
    assert told in capsys.readouterr().err
    assert main([*words, "--top-k", "5", "--seed", "3", "--temperature", "0.5"]) == 0
    assert told not in capsys.readouterr().err
