"""edge bench on a small real bundle: turns, figures by hand from its lines, recordings as simulated, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.bench_table import table_rows
from edge.cli import main
from profiles.contest import Ceiling, Conditions, Outcome, contest, figures, reductions
from profiles.floor import PartCosts
from profiles.rivals import Job, Rival, random_jobs, recorded_jobs, recorded_rival, synthetic_rival
from remoe.simulate import Setting, simulate
from remoe.trace import Trace
from runtime.engine import Engine, EngineOptions
from runtime.errors import UsageError
from runtime.records import TokenRecord
from tests.checkpoints import make_checkpoint
from tests.traces import random_trace, written_trace

LAYERS, EXPERTS, TOP_K = (0, 1), 7, 3
LENGTHS = [(4, 6), (2, 7), (3, 5)]
SLOTS = ["--threads", "1", "--slots-per-layer", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """b.bundle with a tokenizer, and two traces of its shape: a and b, of equal prompts."""
    folder = tmp_path_factory.mktemp("bench")
    sizes = {"num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 512}
    make_checkpoint(folder / "checkpoint", "qwen2_moe", tokenizer=True, **sizes)
    assert main(["export", str(folder / "checkpoint"), str(folder / "b.bundle"), "--graphs", "none"]) == 0
    for seed, name in enumerate("ab"):
        trace_of_shape(seed).save(folder / f"{name}.trace.safetensors")
    return folder


def trace_of_shape(seed: int = 0, lengths: list[tuple[int, int]] = LENGTHS, **changes: Any) -> Trace:
    return random_trace(lengths, len(LAYERS), EXPERTS, TOP_K, seed, **{"moe_layers": LAYERS, **changes})


@dataclass
class Done:
    code: int
    out: str
    err: str
    lines: list[dict[str, Any]]

    @property
    def json(self) -> dict[str, Any]:
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["type"] == kind]


Edge = Callable[..., Done]


@pytest.fixture
def edge(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Edge:
    monkeypatch.chdir(folder)

    def run(*words: str) -> Done:
        out = tmp_path / "bench.jsonl"
        capsys.readouterr()
        code = main(["bench", "b.bundle", *SLOTS, "--out", str(out), *words])
        lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        return Done(code, *capsys.readouterr(), lines)

    return run


ROUTERS = ["--routing", "stock", "--routing", "cache-prior", "--prompts", "2", "--new-tokens", "4"]


def test_settings_take_turns(edge: Edge) -> None:
    """A B, A B; before each turn the ceiling; the tokens of an answer together."""
    done = edge(*ROUTERS, "--overlap", "0.5")
    assert done.code == 0, done.err
    names = ["base", "base, cache-prior", "overlap 0.5"]
    order = [(line["type"], line["request"], line.get("setting")) for line in done.lines[1:-1]]
    expected: list[tuple[str, int, str | None]] = []
    for request in range(2):
        expected.append(("ceiling", request, None))
        for name in names:
            kinds = ["request", "prefill", "token", "token", "token"]
            expected += [(kind, request, name) for kind in kinds]
    assert order == expected
    assert (done.lines[0]["type"], done.lines[0]["names"]) == ("bench", names)
    assert done.lines[-1]["type"] == "end" and done.lines[-1]["complete"] is True


def test_figures_are_what_the_lines_say(edge: Edge) -> None:
    done = edge(*ROUTERS, "--json")
    assert done.code == 0, done.err
    first, second = done.json["settings"]
    assert (first["routing"], second["routing"]) == ("stock", "cache-prior")
    assert second["prior"] == "cache-prior strength=0.1 top_j=1 scaling=mean"
    means = []
    for found in (first, second):
        rows = [row for row in done.of("token") if row["setting"] == found["name"]]
        times = [row["total_ms"] for row in rows]
        means.append(statistics.fmean(times))
        assert found["tpot_ms"] == pytest.approx(
            {"median": statistics.median(times), "p95": max(times), "mean": means[-1]}
        )
        misses = sum(sum(row["misses"]) for row in rows)
        assert found["misses_per_token"] == misses / 6
        assert found["hit_rate"] == pytest.approx(1 - misses / (6 * 2 * 3))  # tokens x layers x top-k
        wasted = sum(row["wasted_bytes"] for row in rows)
        assert found["bytes_per_token"] == sum(row["bytes"] for row in rows) / 6 == (misses * 16384 + wasted) / 6
        assert found["waiting_share"] == pytest.approx(sum(row["wait_ms"] for row in rows) / sum(times))
        busy = sum(row["read_busy_ms"] for row in rows)
        assert found["read_bytes_per_s"] == pytest.approx(sum(row["bytes"] for row in rows) / busy * 1000)
        pairs = [(a, b) for a, b in itertools.pairwise(rows) if a["request"] == b["request"]]
        layers = [zip(a["experts"], b["experts"], strict=True) for a, b in pairs]
        same = sum(len(set(old) & set(new)) for both in layers for old, new in both)
        assert found["overlap"] == pytest.approx(same / (len(pairs) * 2 * 3))
    assert first["less_than_first"] is None and first["route_agreement"] is None
    assert second["less_than_first"]["tpot_ms"]["reduction"] == pytest.approx(1 - means[1] / means[0])
    assert 0 < second["route_agreement"] <= 1
    assert second["less_than_first"]["tpot_ms"]["low"] is None
    assert "no interval: 2 prompts are too few for an interval, at least 5 are needed" in done.err


def test_ceiling_stands_beside(edge: Edge) -> None:
    done = edge(*ROUTERS, "--json")
    rows = done.of("ceiling")
    assert done.json["ceiling"]["raw_read_bytes_per_s"] == statistics.median(r["raw_bytes_per_s"] for r in rows)
    assert done.json["ceiling"]["expert_s"] == statistics.median(r["costs"]["expert_s"] for r in rows)
    floors, over = [], []
    for ceiling in rows:
        of = [r for r in done.of("token") if (r["request"], r["setting"]) == (ceiling["request"], "base")]
        costs, miss_s = ceiling["costs"], 16384 / ceiling["raw_bytes_per_s"]
        times = []
        for row in of:
            total = costs["head_s"]
            for hits, misses in zip(row["hits"], row["misses"], strict=True):
                last = costs["expert_s"] if misses else 0.0  # it can only be computed when all has been read
                others = costs["shared_s"] + (hits + misses) * costs["expert_s"] - last
                total += costs["block_s"] + max(misses * miss_s, others) + last
            times.append(1000 * total)
        floors.append(statistics.median(times))
        over.append(statistics.median(row["total_ms"] for row in of) / floors[-1])
    base = done.json["settings"][0]
    assert (base["floor_ms"], base["over_floor"]) == pytest.approx((statistics.median(floors), statistics.median(over)))
    assert "ceiling: raw reads" in done.err


def test_table_on_stdout_or_one_object(edge: Edge, tmp_path: Path) -> None:
    done = edge(*ROUTERS)
    table = done.out.splitlines()
    assert table[0] == "b.bundle: 2 requests, cold cache of 4 slots per layer"
    assert table[1].split("  ")[1] == "setting" and "less (95 %)" in table[1]
    assert [line.strip().split("  ")[0] for line in table[2:]] == ["base", "base, cache-prior"]
    (tmp_path / "bench.jsonl").unlink()
    done = edge(*ROUTERS, "--json")
    assert done.out.count("\n") == 1 and "setting" in done.err
    assert {"device", "commit", "command", "versions"} <= set(done.json["machine"])
    assert done.json["engine"]["slots_per_layer"] == 4 and "router" not in done.json["engine"]
    end = done.lines[-1]
    assert {name: done.json[name] for name in end if name != "type"} == {n: v for n, v in end.items() if n != "type"}


def test_rows_of_the_table() -> None:
    """By hand: 250 of 1000 ms waited, one interval, nothing read in the second setting."""
    setting: dict[str, Any] = {
        "name": "base", "tpot_ms": {"median": 123.4, "p95": 45.67, "mean": 8.901}, "hit_rate": 0.5,
        "misses_per_token": 12.3, "bytes_per_token": 45.6e6, "overlap": 0.1695, "waiting_share": 0.25,
        "read_bytes_per_s": 2.5e9, "read_share_of_raw": 0.9, "over_floor": 1.2, "less_than_first": None,
    }  # fmt: skip
    less = {"reduction": 0.1234, "low": -0.01, "high": 0.2, "why": ""}
    idle = dict.fromkeys(("read_bytes_per_s", "read_share_of_raw", "over_floor", "overlap"))
    rows = table_rows([setting, {**setting, **idle, "less_than_first": {"tpot_ms": less}}])
    common = ["123", "45.7", "8.90"]
    first = ["-", "50.0 %", "12.3", "45.6", "0.17", "25.0 %", "2.50", "90.0 %", "1.20"]
    second = ["12.3 % (-1.0 to 20.0)", "50.0 %", "12.3", "45.6", "-", "25.0 %", "-", "-", "-"]
    assert rows[1:] == [["base", *common, *first], ["base", *common, *second]]
    assert len(rows[0]) == len(rows[1])


@pytest.mark.parametrize("cache", ["--cold", "--warm"])
def test_recordings_miss_what_the_simulator_says(edge: Edge, cache: str) -> None:
    """Warm: the request before, in the same setting, is what the cache has seen; the first follows the last."""
    done = edge("--replay", "a.trace.safetensors", "b.trace.safetensors", cache)
    assert done.code == 0, done.err
    assert "the recordings have 3 requests in common, not 8" in done.err
    order = [(line["setting"], line["request"]) for line in done.of("request")]
    assert order == [(name, number) for number in range(3) for name in ("replay a", "replay b")]
    for seed, name in enumerate("ab"):
        trace = trace_of_shape(seed)
        for number, rows in enumerate(trace.request_rows()):
            tokens = [r for r in done.of("token") if (r["setting"], r["request"]) == (f"replay {name}", number)]
            decode = slice(rows.start + LENGTHS[number][0], rows.stop)
            assert [r["experts"] for r in tokens] == trace.experts[decode].tolist()
            assert [r["misses"] for r in tokens] == predicted(trace, number, warm=cache == "--warm")


def predicted(trace: Trace, number: int, warm: bool) -> list[list[int]]:
    """Misses of a request's decode steps, behind the request before it where the cache is warm."""
    requests = trace.request_rows()
    before = [*requests[number - 1]] if warm else []
    rows = [*before, *requests[number]]
    names = ("experts", "weights", "tokens", "positions", "decode", "logits")
    part: dict[str, Any] = {name: getattr(trace, name)[rows] for name in names}
    part["requests"] = (np.arange(len(rows)) >= len(before)).astype(np.int32)
    missed = simulate(Trace.from_arrays(trace.info, part), Setting("lru", 4, cold=False)).missed
    found: list[list[int]] = missed[-LENGTHS[number][1] :].tolist()
    return found


def test_first_recording_decides_what_is_answered(edge: Edge) -> None:
    """Prompts and lengths are those of the recording; routers and made-up routing answer the same requests."""
    done = edge(
        "--replay", "b.trace.safetensors", "--router", "base", "--overlap", "0.6", "--new-tokens", "6", "--json"
    )
    assert done.json["names"] == ["base", "replay b", "overlap 0.6"]
    wanted = [{"prompt_tokens": p, "new_tokens": min(6, d + 1)} for p, d in LENGTHS]
    assert done.json["requests"] == wanted
    base, replayed, made_up = done.json["settings"]
    assert base["decode_tokens"] == replayed["decode_tokens"] == made_up["decode_tokens"] == 5 + 5 + 5
    assert replayed["model"] == "test" and made_up["wanted_overlap"] == 0.6


def open_engine(folder: Path, **changes: Any) -> Engine:
    return Engine.open(folder / "b.bundle", EngineOptions(slots_per_layer=4, context=128, threads=1, **changes))


def test_interval_by_resampled_requests(folder: Path) -> None:
    """Six requests give one; a rival that reads nothing less has the same misses."""
    with open_engine(folder) as engine:
        jobs = random_jobs(6, 3, engine.config)
        outcome = contest(engine, [Rival("a"), Rival("b")], jobs, Conditions(temperature=1.0))
    less = reductions(outcome)["b"]
    assert list(reductions(outcome)) == ["b"]
    assert (less["misses"].reduction, less["misses"].low, less["misses"].high) == (0.0, 0.0, 0.0)
    assert less["tpot_ms"].low is not None and less["tpot_ms"].prompts == 6 and less["tpot_ms"].paired


def test_ctrl_c_keeps_whole_rounds(folder: Path) -> None:
    """Asked to stop in the second answer of the second round: both settings are left with one request."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2 * 3 + 2 * 3 + 3 + 1  # warm-up, first round, one answer and a token

    with open_engine(folder) as engine:
        jobs = random_jobs(3, 3, engine.config)
        outcome = contest(engine, [Rival("a"), Rival("b")], jobs, Conditions(), stop=stop)
        engine.check_integrity()
    assert not outcome.complete and len(outcome.ceilings) == 1
    found = figures(outcome, 16384)
    assert [found[name]["decode_tokens"] for name in "ab"] == [2, 2]


def test_nothing_to_compare_is_an_interrupt(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiles.contest.contest", lambda *args, **kwargs: Outcome())
    done = edge(*ROUTERS)
    assert (done.code, done.out) == (130, "") and "interrupted" in done.err


def test_without_a_tokenizer_prompts_are_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path / "checkpoint", "olmoe", num_hidden_layers=1)
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "b.bundle"), "--graphs", "none"]) == 0
    words = ["bench", str(tmp_path / "b.bundle"), *SLOTS, "--prompts", "1", "--new-tokens", "2", "--json"]
    capsys.readouterr()
    assert main(words) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["names"] == ["base"] and found["conditions"]["temperature"] == 1.0
    assert found["requests"] == [{"prompt_tokens": 16, "new_tokens": 2}]
    assert "prompts are random tokens" in err
    assert main([*words, "--workload", "own"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_floor_of_a_token_and_no_disk_rate() -> None:
    """2 layers: 1 ms block each; reading 2 blobs takes 4 ms, beside 0.5 ms shared and 1 hit of 0.25 ms."""
    costs = PartCosts(head_s=0.005, block_s=0.001, shared_s=0.0005, expert_s=0.00025)
    fields = dict.fromkeys(TokenRecord.__dataclass_fields__, 0)
    record = TokenRecord(**{**fields, "hits": [1, 3], "misses": [2, 0]})  # type: ignore[arg-type]
    assert Ceiling(costs, 1e6).floor_ms(2000, record) == pytest.approx(5 + (1 + 4 + 0.25) + (1 + 0.5 + 0.75))
    assert Ceiling(costs, None).floor_ms(2000, record) is None


class TestJobs:
    def jobs(self, folder: Path, *traces: Trace, count: int = 8, context: int = 128) -> tuple[list[Job], list[str]]:
        notes: list[str] = []
        with open_engine(folder) as engine:
            named = {f"t{i}": trace for i, trace in enumerate(traces)}
            return recorded_jobs(named, count, 8, engine.config, context, notes.append), notes

    def test_shortest_recording_counts(self, folder: Path) -> None:
        longer = trace_of_shape(1, [(4, 9), (2, 3), (3, 9), (1, 1)])
        jobs, notes = self.jobs(folder, trace_of_shape(), longer)
        assert [(len(job.prompt), job.new_tokens) for job in jobs] == [(4, 7), (2, 4), (3, 6)]
        assert jobs[1].prompt == tuple(trace_of_shape().tokens[10:12].tolist())
        assert notes == ["the recordings have 3 requests in common, not 8"]

    def test_text_that_was_read_has_a_prompt_of_one_token(self, folder: Path) -> None:
        rows = [[[0, 1, 2], [2, 3, 4]]] * 4
        read = written_trace(rows, EXPERTS)
        jobs, _ = self.jobs(folder, dataclasses.replace(read, info=dataclasses.replace(read.info, moe_layers=LAYERS)))
        assert jobs == [Job((0,), 4, 0)]

    def test_requests_that_cannot_be_answered_are_left_out(self, folder: Path) -> None:
        jobs, notes = self.jobs(folder, trace_of_shape(0, [(5, 0), (40, 3), (2, 3)]), count=3, context=20)
        assert [job.request for job in jobs] == [2]
        assert "2 recorded requests have no decode step, or do not fit a context of 20: left out" in notes
        with pytest.raises(UsageError, match="no recorded request can be run"):
            self.jobs(folder, trace_of_shape(0, [(5, 0), (3, 1)]), count=1)

    def test_other_prompts_are_refused(self, folder: Path) -> None:
        with pytest.raises(UsageError, match="request 1: the prompt has 2 tokens in t0, 3 in t1: replay recordings of"):
            self.jobs(folder, trace_of_shape(), trace_of_shape(1, [(4, 6), (3, 7), (3, 5)]))

    def test_tokens_of_a_larger_vocabulary_are_replaced(self, folder: Path) -> None:
        trace = trace_of_shape()
        trace = dataclasses.replace(trace, tokens=trace.tokens + 1000)
        jobs, _ = self.jobs(folder, trace)
        assert all(0 <= token < 300 for job in jobs for token in job.prompt)

    def test_rivals_of_another_shape_are_refused_by_name(self, folder: Path) -> None:
        with open_engine(folder) as engine:
            foreign = random_trace(LENGTHS, 2, 9, TOP_K, moe_layers=LAYERS)
            with pytest.raises(
                UsageError, match="x: this routing was recorded from a model with the top 3 of 9 experts"
            ):
                recorded_rival("x", foreign, [Job((1,), 2, 0)], engine.config)
            rival = synthetic_rival(0.5, [Job((1, 2), 4), Job((1,), 3)], engine.config, 16384)
            assert rival.steps is not None and [len(steps) for steps in rival.steps] == [5, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "0"], "--prompts 0: expected at least 1"),
        (["--new-tokens", "1"], "--new-tokens 1: expected at least 2"),
        (["--prior-strength", "0.2"], "need --routing cache-prior"),
        (["--replay", "a.trace.safetensors", "--workload", "own"], "with --replay the requests are those recorded"),
        (["--replay", "a.trace.safetensors", "a.trace.safetensors"], "another trace has that name"),
        (["--replay", "none.trace.safetensors"], "none.trace.safetensors: No such file"),
        (["--router", "base", "--router", "base"], "the setting 'base' is named twice"),
        (["--router", "remoe-x"], "no router 'remoe-x'"),
        (["--overlap", "1.5"], "an overlap of 1.5 cannot be"),
        (["--overlap", "0.5", "0.50"], "the setting 'overlap 0.5' is named twice"),
        (["--routing", "cache-prior", "--prior-top-j", "9"], "--prior-top-j 9: expected 0 to 3"),
        (["--cold", "--warm"], "not allowed with"),
        (["--slots-per-layer", "2"], "2 slots per layer cannot hold the top 3"),
    ],
)
def test_refusals_leave_nothing_behind(edge: Edge, tmp_path: Path, words: list[str], message: str) -> None:
    done = edge(*words)
    assert done.code == 2 and message in done.err and done.out == ""
    assert not (tmp_path / "bench.jsonl").exists()


def test_never_writes_over_a_run(edge: Edge, tmp_path: Path) -> None:
    (tmp_path / "bench.jsonl").write_text('{"type": "kept"}\n')
    done = edge(*ROUTERS)
    assert done.code == 2 and "a run never writes over another one" in done.err
    assert done.lines == [{"type": "kept"}]


def test_policies_are_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy answers of one router under two policies are equal, so misses may differ and nothing else."""
    words = ["bench", str(folder / "b.bundle"), *SLOTS, "--prompts", "2", "--new-tokens", "12", "--json"]
    assert main([*words, "--policy", "gate", "--policy", "fifo"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["names"] == ["base, gate", "base, fifo"]
    assert [setting["policy"] for setting in report["settings"]] == ["gate", "fifo"]
    assert len({setting["overlap"] for setting in report["settings"]}) == 1
    assert report["settings"][0]["misses_per_token"] != report["settings"][1]["misses_per_token"]
    assert main([*words, "--overlap", "0.2", "--policy", "gate"]) == 2
    assert "which needs a real router" in capsys.readouterr().err
