"""edge profile on a small real bundle: what is written, cold and warm, Ctrl-C, telemetry that fails, refusals."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge.cli import main
from profiles import run as run_module
from profiles.rundir import RunWriter, load_run
from profiles.summary import summarize
from runtime.engine import Engine
from runtime.errors import EdgeError, UsageError
from tests.checkpoints import make_checkpoint
from tests.unit.fake_tegrastats import FakeTegrastats


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bundle")
    sizes = {"num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 512}
    make_checkpoint(folder / "checkpoint", "qwen2_moe", tokenizer=True, **sizes)
    assert main(["export", str(folder / "checkpoint"), str(folder / "b.bundle"), "--graphs", "none"]) == 0
    return str(folder / "b.bundle")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTegrastats]:
    fake = FakeTegrastats(tmp_path, monkeypatch)
    yield fake
    end = time.monotonic() + 5  # a killed process group is gone a moment after the signal
    while fake.running() and time.monotonic() < end:
        time.sleep(0.01)
    assert fake.running() == []


@dataclass
class Outcome:
    code: int
    out: str
    err: str
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        found = json.loads((self.folder / "summary.json").read_text())
        assert isinstance(found, dict)
        return found

    def lines(self, kind: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (self.folder / "tokens.jsonl").read_text().splitlines()]
        return [row for row in rows if row["type"] == kind]


Edge = Callable[..., Outcome]


@pytest.fixture
def edge(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Edge:
    def run(*words: str) -> Outcome:
        folder = tmp_path / "run"
        fixed = ["--threads", "1", "--slots-per-layer", "4", "--out", str(folder)]
        capsys.readouterr()
        code = main(["profile", bundle, *fixed, *words])
        return Outcome(code, *capsys.readouterr(), folder)

    return run


SMALL = ["--prompts", "2", "--new-tokens", "4"]


def test_everything_is_written(edge: Edge, bundle: str) -> None:
    done = edge(*SMALL, "--repeats", "2", "--telemetry", "host", "--json")
    assert done.code == 0, done.err
    assert sorted(p.name for p in done.folder.iterdir()) == [
        "run.json", "summary.json", "telemetry.jsonl", "tokens.jsonl",
    ]  # fmt: skip
    header = json.loads((done.folder / "run.json").read_text())
    assert header["protocol"]["name"] == "default, changed: prompts=2, new_tokens=4, repeats=2"
    assert header["workload"]["prompts"] == ["chat-01", "math-01"]
    assert header["engine"]["slots_per_layer"] == 4 and header["bundle"] == bundle
    assert {"device", "kernel", "power_mode", "versions", "commit", "command"} <= set(header["machine"])
    order = [(r["index"], r["repeat"], r["prompt_id"]) for r in done.lines("request")]
    assert order == [(0, 0, "chat-01"), (1, 0, "math-01"), (2, 1, "chat-01"), (3, 1, "math-01")]
    assert len(done.lines("prefill")) == 4 and len(done.lines("token")) == 12
    assert [r["finish_reason"] for r in done.lines("request_end")] == ["length"] * 4
    assert json.loads(done.out) == done.summary
    assert done.summary["complete"] is True
    assert (done.summary["requests"], done.summary["decode_tokens"]) == (4, 12)


def test_summary_is_what_the_lines_say(edge: Edge) -> None:
    done = edge(*SMALL, "--telemetry", "none")
    rows, found = done.lines("token"), done.summary
    times = sorted(row["total_ms"] for row in rows)
    assert found["tpot_ms"]["median"] == pytest.approx((times[2] + times[3]) / 2)
    assert found["tpot_ms"]["p95"] == times[-1]
    hits, misses = sum(sum(r["hits"]) for r in rows), sum(sum(r["misses"]) for r in rows)
    assert hits + misses == 6 * 2 * 3  # tokens x layers x top-k
    assert found["hit_rate"] == hits / (hits + misses)
    assert found["misses_per_token"] == misses / 6
    layer = [sum(r["hits"][1] for r in rows), sum(r["misses"][1] for r in rows)]
    assert found["hit_rate_per_layer"][1] == layer[0] / sum(layer)
    assert sum(found["parts_ms"].values()) == pytest.approx(found["tpot_ms"]["mean"], abs=1e-3)
    assert found["telemetry"] is None and found["energy"]["joules_per_token"] is None
    assert "- J per token (no power rail)" in done.err


def test_cold_is_cold_for_every_request_and_warm_is_not(edge: Edge) -> None:
    done = edge(*SMALL, "--cache", "cold", "--repeats", "2", "--telemetry", "none")
    assert [sum(row["hits"]) for row in done.lines("prefill")] == [0, 0, 0, 0]
    (done.folder).rename(done.folder.with_name("cold"))
    done = edge(*SMALL, "--repeats", "2", "--telemetry", "none")
    assert all(sum(row["hits"]) > 0 for row in done.lines("prefill"))


def test_a_cold_run_that_is_not_cold_fails(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "empty_cache", lambda self: None)
    done = edge(*SMALL, "--cache", "cold", "--telemetry", "none")
    assert done.code == 1
    assert "the cache was to be cold, but the prefill found" in done.err


def test_cold_and_warm_choose_the_same_tokens(edge: Edge) -> None:
    texts = []
    for cache in ("cold", "warm"):
        done = edge(*SMALL, "--cache", cache, "--telemetry", "none")
        texts.append([row["token_id"] for row in [*done.lines("prefill"), *done.lines("token")]])
        done.folder.rename(done.folder.with_name(cache))
    assert texts[0] == texts[1]


def test_a_whole_run_beside_tegrastats(edge: Edge, fake: FakeTegrastats) -> None:
    fake.install("steady")
    done = edge(*SMALL, "--telemetry", "tegrastats")
    assert done.code == 0, done.err
    run = load_run(done.folder)
    assert run.header["telemetry"] == {"source": "tegrastats", "choice": "telemetry: tegrastats, as asked for"}
    times = [s.time_ns for s in run.samples]
    assert times[0] < run.requests[0].start_ns and times[-1] > run.requests[-1].records[-1].time_ns
    # 5 W all the time: joules are 5 x seconds, and every answer of a model this small is a short window.
    figures = done.summary["energy"]
    seconds = sum(r.records[-1].time_ns - r.records[0].time_ns for r in run.requests) / 1e9
    assert figures["joules_per_token"] == pytest.approx(5 * seconds / 6)
    assert (figures["rails"], figures["answers_covered"], figures["answers_short"]) == (["VDD_IN"], 2, 2)
    assert done.summary["telemetry"]["power_w"] == {"min": 5.0, "max": 5.0}
    assert done.summary["telemetry_problems"] == []
    assert fake.started == 1


@pytest.mark.parametrize(
    ("mode", "problem"),
    [
        ("dies", "ended by itself after"),
        ("mixed", "lines could not be read, the first: RAM: found 'lots'"),
        ("hangs", None),  # too short a run to call it silence, but there is no energy
    ],
)
def test_telemetry_that_fails_on_the_way_is_told_and_the_run_goes_on(
    mode: str, problem: str | None, edge: Edge, fake: FakeTegrastats
) -> None:
    fake.install(mode)
    done = edge(*SMALL, "--telemetry", "tegrastats")
    assert done.code == 0, done.err
    assert done.summary["complete"] is True and done.summary["decode_tokens"] == 6
    if problem:
        assert problem in done.summary["telemetry_problems"][0]
        assert f"edge: {done.summary['telemetry_problems'][0]}" in done.err
    if mode != "mixed":
        assert done.summary["energy"]["joules_per_token"] is None
        assert done.summary["energy"]["why_not"] == "the samples do not cover the window"


def test_telemetry_that_does_not_start_leaves_no_folder(edge: Edge, fake: FakeTegrastats) -> None:
    fake.install("refuses")
    done = edge(*SMALL, "--telemetry", "tegrastats")
    assert (done.code, done.folder.exists()) == (1, False)
    assert done.err.count("edge: error:") == 1 and "needs root" in done.err


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_keeps_what_there_is(presses: int, edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    token = RunWriter.token
    seen: list[int] = []

    def press(self: RunWriter, request: int, record: Any) -> None:
        token(self, request, record)
        seen.append(request)
        if len(seen) == 7:  # third token of the second request
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunWriter, "token", press)
    before = signal.getsignal(signal.SIGINT)
    done = edge("--prompts", "5", "--new-tokens", "4", "--telemetry", "host")
    assert done.code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert done.summary["complete"] is False
    assert (done.summary["requests_wanted"], done.summary["decode_tokens"]) == (5, 5)
    assert [r["finish_reason"] for r in done.lines("request_end")] == ["length", "interrupted"]
    assert "interrupted; run: edge report" in done.err


def test_a_run_that_was_killed_can_be_read(edge: Edge) -> None:
    done = edge(*SMALL, "--telemetry", "host")
    (done.folder / "summary.json").unlink()
    tokens = (done.folder / "tokens.jsonl").read_bytes()
    (done.folder / "tokens.jsonl").write_bytes(
        tokens[: tokens.rindex(b'"type":"token"') + 30]
    )  # in the middle of a line
    run = load_run(done.folder)
    assert [r.complete for r in run.requests] == [True, False]
    assert run.summary is None
    assert summarize(run)["decode_tokens"] == 5


def test_refusals(edge: Edge, tmp_path: Path, bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    (tmp_path / "twice.jsonl").write_text('{"id": "x", "prompt": "a"}\n{"id": "x", "prompt": "b"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 600}) + "\n")
    for words, message in (
        (["--workload", "humanevil"], "unknown workload 'humanevil' (known: own, sharegpt, gsm8k, humaneval;"),
        (["--workload", str(tmp_path / "none.jsonl")], "none.jsonl: No such file"),
        (["--workload", str(tmp_path / "empty.jsonl")], "empty.jsonl: no prompts in it"),
        (["--workload", str(tmp_path / "odd.jsonl")], 'odd.jsonl: line 2: expected an object like {"id"'),
        (["--workload", str(tmp_path / "twice.jsonl")], "two prompts have the same id"),
        (["--workload", str(tmp_path / "long.jsonl")], "no prompt of long fits into a context of 512"),
        (["--warm-up", "0"], "a warm cache needs at least one warm-up request"),
        (["--prompts", "0"], "prompts 0: expected at least 1"),
        (["--new-tokens", "1"], "new-tokens 1: expected at least 2"),
        (["--telemetry", "jtop"], "jtop: not installed"),
        (["--settle", "1", "--telemetry", "none"], "--settle needs a telemetry source with temperatures"),
    ):
        done = edge(*words)
        assert (done.code in (1, 2), done.err.count("edge: error:")) == (True, 1), done.err
        assert message in done.err
        if "--settle" not in words:
            assert not done.folder.exists()
    done = edge("--telemetry", "none")
    assert done.code == 2 and "run exists: a run never writes over another one; name a new folder" in done.err


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"x is no run of edge profile: run.json: No such file"):
        load_run(tmp_path / "x")
    for text, message in (("[]", "expected an object"), ("{", "not valid JSON"), ('{"format": 9}', "format 9, this")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            load_run(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 1}')
    with pytest.raises(UsageError, match=r"run.json: field 'bundle' is missing: not written by edge profile"):
        load_run(tmp_path)
    needed = dict.fromkeys(["bundle", "workload", "protocol", "requests", "machine", "start_time"])
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, **needed}))
    for name, line in (
        ("telemetry", '{"RAM": 3}'),
        ("telemetry", "[1]"),
        ("tokens", '{"type": "token", "request": 3}'),
    ):
        for file in ("telemetry", "tokens"):
            (tmp_path / f"{file}.jsonl").write_text(line + "\n" if file == name else "")
        with pytest.raises(UsageError, match=f"{name}.jsonl: not written by edge profile"):
            load_run(tmp_path)


def test_a_full_disk_ends_telemetry_or_the_run_with_one_line(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RunWriter, sample: Any) -> None:
        raise EdgeError("telemetry.jsonl: No space left on device")

    monkeypatch.setattr(RunWriter, "sample", full)
    done = edge(*SMALL, "--telemetry", "host")
    assert done.code == 0 and done.summary["decode_tokens"] == 6
    assert done.summary["telemetry_problems"] == ["telemetry.jsonl: No space left on device"]
    done.folder.rename(done.folder.with_name("first"))
    monkeypatch.setattr(RunWriter, "token", lambda self, request, record: full(self, record))
    done = edge(*SMALL, "--telemetry", "none")
    assert done.code == 1 and "edge: error: telemetry.jsonl: No space left on device" in done.err


def test_settling_waits_for_a_steady_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run_module.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    falls = lambda: max(40.0, 50.0 - 0.5 * clock[0])  # noqa: E731 - 40 degrees are reached after 20 s
    # From 18.5 s on (40.75 degrees) the last ten seconds are within one degree: 28.5 s.
    assert run_module.settle(falls, 60, lambda: False) == {"steady": True, "seconds": 28.5, "hottest_c": 40.0}
    clock[0] = 0.0
    found = run_module.settle(lambda: clock[0], 20, lambda: False)
    assert found == {"steady": False, "seconds": 20.0, "hottest_c": 20.0}
    assert run_module.settle(lambda: None, 0, lambda: False) is None
