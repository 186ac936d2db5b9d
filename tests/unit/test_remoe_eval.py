"""edge eval: its figures against the engine's own logits, the judged cache against a running one, and its refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge.cli import main
from export.exporter import export_bundle
from remoe.evaluate import EvalOptions, Evaluation, Variant, evaluate
from remoe.harness import Scorer, run_tasks
from remoe.record import record_text, watching
from remoe.trace import Origin, Trace
from runtime.cache_prior import CachePrior
from runtime.engine import Engine, EngineOptions
from runtime.errors import BudgetError, UsageError
from runtime.router_file import save_router
from tests.checkpoints import make_checkpoint

WINDOWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [40, 41, 42, 43, 44, 45, 46]]
SOURCE = Origin("windows", "0" * 64)
TEXT = "The lighthouse keeper lit the lamp, and the lamp lit the sea."


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    checkpoint = make_checkpoint(folder / "checkpoint", "olmoe", tokenizer=True, vocab_size=300, num_hidden_layers=2)
    export_bundle(checkpoint, folder / "bundle")
    return folder / "bundle"


@pytest.fixture(scope="module")
def tuned(bundle: Path) -> Path:
    """A router file whose gates are a little off."""
    with Engine.open(bundle, EngineOptions(slots_per_layer=3)) as engine:
        noise = torch.Generator().manual_seed(0)
        gates = {
            name: gate + 0.1 * gate.std() * torch.randn(gate.shape, generator=noise)
            for name, gate in engine.router.tensors().items()
        }
    save_router(bundle.parent / "tuned.safetensors", gates, None)
    return bundle.parent / "tuned.safetensors"


def open_engine(bundle: Path, **options: Any) -> Engine:
    return Engine.open(bundle, EngineOptions(**{"slots_per_layer": 10, "context": 64, "dtype": "fp32", **options}))


def judge(bundle: Path, *variants: Variant, slots: tuple[int, ...] = (4,)) -> list[Evaluation]:
    with open_engine(bundle) as engine:
        return evaluate(engine, variants, WINDOWS, SOURCE, EvalOptions(slots, segment=4))


def test_quality_is_what_the_engines_logits_say(bundle: Path, tuned: Path) -> None:
    stock, other = judge(bundle, Variant(), Variant(str(tuned)), slots=(3, 6))
    found: dict[str, list[torch.Tensor]] = {"base": [], str(tuned): []}
    for router, logits in found.items():
        with open_engine(bundle, router=router) as engine:
            logits += [engine.logits(window)[:-1].double().log_softmax(-1) for window in WINDOWS]
    targets = torch.tensor([token for window in WINDOWS for token in window[1:]])
    ours, theirs = torch.cat(found["base"]), torch.cat(found[str(tuned)])
    nll = {
        name: -float(p[torch.arange(len(targets)), targets].mean()) for name, p in (("base", ours), ("tuned", theirs))
    }
    assert stock.quality.tokens == other.quality.tokens == len(targets) == 17
    assert np.log(stock.quality.perplexity) == pytest.approx(nll["base"], rel=1e-6)
    assert np.log(other.quality.perplexity) == pytest.approx(nll["tuned"], rel=1e-6)
    assert (stock.quality.mean_kl, stock.quality.top1_agreement, stock.route_agreement) == (0.0, 1.0, 1.0)
    assert other.quality.mean_kl == pytest.approx(float((ours.exp() * (ours - theirs)).sum(-1).mean()), rel=1e-5)
    assert other.quality.top1_agreement == float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    same = [
        len(set(a) & set(b))
        for a, b in zip(
            stock.trace.experts.reshape(-1, 3).tolist(), other.trace.experts.reshape(-1, 3).tolist(), strict=True
        )
    ]
    assert other.route_agreement == pytest.approx(sum(same) / (19 * 2 * 3))
    assert 0.3 < other.route_agreement < 1
    assert [cache.slots for cache in other.caches] == [3, 6]
    assert other.trace.info.router.sha256 != stock.trace.info.router.sha256
    assert stock.trace.info.router.sha256 == stock.trace.info.gates_sha256 == other.trace.info.gates_sha256


def test_a_judged_cache_chooses_what_a_running_one_does(bundle: Path) -> None:
    """All experts are resident while a cache of four slots is judged; an engine with four slots routes the same."""
    _, judged = judge(bundle, Variant("base", CachePrior(0.3), 4))
    options = {"slots_per_layer": 4, "routing": "cache-prior", "prior_strength": 0.3}
    misses = []
    with open_engine(bundle, **options) as engine, watching(engine) as watcher:
        blocks = []
        for number, window in enumerate(WINDOWS):
            engine.empty_cache()
            engine.decoder.cache.take_stats()
            blocks.append(record_text(engine, watcher, number, window, stepwise=True))
            misses.append(sum(engine.decoder.cache.take_stats().misses))
    experts = np.concatenate([block.experts for block in blocks if block is not None])
    assert np.array_equal(experts, judged.trace.experts)
    assert judged.caches[0].result.misses == sum(misses)
    assert judged.trace.info.routing == "cache-prior strength=0.3 top_j=1 scaling=mean slots=4 policy=lru"


def test_a_prior_of_strength_0_is_the_stock_router(bundle: Path) -> None:
    stock, still = judge(bundle, Variant("base", CachePrior(0.0), 4))
    assert still.quality.mean_kl == pytest.approx(0.0, abs=1e-7)
    assert still.route_agreement == 1.0
    assert still.caches[0].result.misses == stock.caches[0].result.misses


def test_a_stronger_prior_reads_less(bundle: Path) -> None:
    found = judge(bundle, *(Variant("base", CachePrior(x), 4) for x in (0.1, 1.0)))
    misses = [result.caches[0].result.misses for result in found]
    assert misses[0] > misses[1] > misses[2]
    assert found[0].quality.mean_kl < found[1].quality.mean_kl < found[2].quality.mean_kl


def test_the_engine_routes_as_before_afterwards(bundle: Path, tuned: Path) -> None:
    with open_engine(bundle, routing="cache-prior") as engine:
        evaluate(engine, [Variant(str(tuned))], WINDOWS, SOURCE, EvalOptions((4,)))
        assert (engine.options.router, engine.options.prior) == ("base", CachePrior())


@pytest.mark.parametrize(
    ("variant", "slots", "error", "message"),
    [
        (Variant("chat"), (4,), UsageError, "no router 'chat'"),
        (Variant(), (2,), BudgetError, "2 slots per layer cannot hold the top 3"),
        (Variant("base", CachePrior(), 2), (4,), BudgetError, "2 slots per layer cannot hold the top 3"),
        (Variant("base", CachePrior(-1), 4), (4,), UsageError, "--prior-strength -1"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    bundle: Path, variant: Variant, slots: tuple[int, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        judge(bundle, variant, slots=slots)
    with pytest.raises(UsageError, match="no size of cache to judge"):
        EvalOptions(())


def edge(*words: str | Path) -> int:
    return main([*map(str, words), "--threads", "1"] if words[0] != "simulate" else [*map(str, words)])


def test_from_the_command_line(bundle: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    command = ["eval", bundle, "--text", tmp_path / "a.txt", "--window", "20", "--tokens", "40", "--slots", "3", "6",
               "--router", "base", tuned, "--routing", "cache-prior", "--prior-strength", "0.2"]  # fmt: skip
    assert edge(*command, "--save-traces", tmp_path / "kept", "--json") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(Path(r["router"]).stem, r["prior_slots"]) for r in results] == [
        ("base", None), ("tuned", None), ("base", 3), ("base", 6), ("tuned", 3), ("tuned", 6),
    ]  # fmt: skip
    assert results[0]["predicted_tokens"] == 38
    assert results[0]["kl"] == 0 < results[1]["kl"]
    assert [cache["slots"] for cache in results[1]["caches"]] == [3, 6]
    assert [cache["slots"] for cache in results[2]["caches"]] == [3]
    kept = sorted((tmp_path / "kept").iterdir())
    assert [Trace.load(path).info.router.name for path in kept[:2]] == ["base", str(tuned)]
    assert edge("simulate", kept[1], "--slots", "3", "--policy", "lru", "--json") == 0
    simulated = json.loads(capsys.readouterr().out)["results"][0]
    assert simulated["misses"] == results[1]["caches"][0]["misses"]
    assert edge(*command[:-2], "--prior-strength", "0.1") == 0
    table = capsys.readouterr().out
    assert table.count("base, cache-prior strength=0.1") == 4  # two sizes, in both tables


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "{empty}"], "empty"),
        (["--text", "{binary}"], "not UTF-8 text"),
        (["--text", "{text}", "--window", "1"], "--window 1: expected at least 2"),
        (["--text", "{text}", "--window", "9999"], "--window 9999 is longer than the context"),
        (["--text", "{text}", "--slots", "2"], "2 slots per layer cannot hold the top 3"),
        (["--text", "{text}", "--router", "{text}"], "is not a router of"),
        (["--text", "{text}", "--prior-strength", "1"], "need --routing cache-prior"),
        (["--text", "{text}", "--policy", "belady"], "invalid choice: 'belady'"),
        (["--text", "{text}", "--segment", "0"], "--segment 0"),
        (["--workload", "nothing"], "unknown workload 'nothing'"),
        ([], "one of the arguments --text --workload --tasks is required"),
    ],
)
def test_bad_requests_say_what_is_wrong(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    files = {"empty": b"", "binary": b"\xff\xfe\x00", "text": TEXT.encode()}
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    said = [word.format(**{name: tmp_path / f"{name}.txt" for name in files}) for word in words]
    assert edge("eval", bundle, "--slots-per-layer", "4", *said) == 2
    assert message in capsys.readouterr().err


def test_scores_are_sums_of_the_engines_log_probabilities(bundle: Path) -> None:
    with open_engine(bundle) as engine:
        scorer = Scorer(engine)
        ids = engine.encode("ab cde")
        log_p = engine.logits(ids).double().log_softmax(-1)
        each = [float(log_p[at, token]) for at, token in enumerate(ids[1:])]
        assert scorer.continuation("ab", " cde") == (pytest.approx(sum(each[1:])), False)
        assert scorer.continuation("ab ", "cde")[0] == pytest.approx(sum(each[1:]))  # the blank is scored, too
        best = engine.encode("a")
        best.append(int(engine.logits(best)[-1].argmax()))
        assert scorer._score(best, 1)[1]
        start = [1, *ids]  # a text is scored after the begin token
        log_p = engine.logits(start).double().log_softmax(-1)
        assert scorer.whole("ab cde") == pytest.approx(sum(float(log_p[at, t]) for at, t in enumerate(ids)))


def test_long_texts_are_scored_in_windows_each_token_once(bundle: Path) -> None:
    with open_engine(bundle, context=8) as engine:
        ids = [1, *engine.encode(TEXT)]
        assert len(ids) - 1 == 61
        expected = 0.0
        # (first token read, first scored, one after the last): eight at a time, and five are left for the last
        for first, at, end in [*((at - 1, at, at + 8) for at in range(1, 57, 8)), (53, 57, 62)]:
            log_p = engine.logits(ids[first : end - 1]).double().log_softmax(-1)
            expected += sum(float(log_p[i - 1 - first, ids[i]]) for i in range(at, end))
        assert Scorer(engine).whole(TEXT) == pytest.approx(expected)
        likelihood, _ = Scorer(engine).continuation(TEXT, " Yes")  # the beginning of the context is cut off
        log_p = engine.logits((engine.encode(TEXT + " Yes"))[-9:-1]).double().log_softmax(-1)
        last = engine.encode(" Yes")
        assert likelihood == pytest.approx(sum(float(log_p[i + 4, t]) for i, t in enumerate(last)))


@pytest.mark.parametrize(
    ("special", "begin", "prefix"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, 0, 1),
        ({"eos_token": "</s>"}, 0, 2),  # no begin token, though the model's config names one: as in the harness
        ({}, 0, 0),
        ({}, None, 7),
    ],
)
def test_the_first_token_of_a_text_is_scored_after_the_prefix_of_the_harness(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, special: dict[str, str], begin: int | None, prefix: int
) -> None:
    with open_engine(bundle) as engine:
        monkeypatch.setattr(engine.tokenizer, "_special", special)
        engine.config = dataclasses.replace(engine.config, bos_token_id=begin, eos_token_ids=(7,))
        ids = [prefix, *engine.encode("ab")]
        log_p = engine.logits(ids).double().log_softmax(-1)
        expected = sum(float(log_p[at, token]) for at, token in enumerate(ids[1:]))
        assert Scorer(engine).whole("ab") == pytest.approx(expected)
        assert Scorer(engine).continuation("", "ab")[0] == pytest.approx(expected)


def test_a_prior_acts_on_the_tokens_after_the_context(bundle: Path) -> None:
    with open_engine(bundle, slots_per_layer=3) as engine:
        stock = Scorer(engine).continuation("The keeper", " lit the lamp")[0]
        engine.use_router("base", CachePrior(0.0))
        assert Scorer(engine).continuation("The keeper", " lit the lamp")[0] == pytest.approx(stock, rel=1e-5)
        engine.use_router("base", CachePrior(50.0))
        assert Scorer(engine).continuation("The keeper", " lit the lamp")[0] != pytest.approx(stock, rel=1e-3)


def test_answers_end_at_stop_strings(bundle: Path) -> None:
    with open_engine(bundle) as engine:
        scorer = Scorer(engine)
        whole = scorer.answer("a", {"max_gen_toks": 12, "until": []})
        stop = whole[4:6]
        assert scorer.answer("a", {"max_gen_toks": 12, "until": [stop]}) == whole[: whole.index(stop)]


def test_without_the_harness_it_says_what_to_install(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with open_engine(bundle) as engine, pytest.raises(UsageError, match=r"pip install \"remoe-edge\[eval\]\""):
        run_tasks(engine, ["arc_easy"])


TASK = """
task: keeper
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_task_of_the_harness(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four questions whose answers are what this random model likes best: all right; and then one of them wrong."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    questions = ["The sea", "A lamp", "One night", "Two boats"]
    choices = [" is blue", " and wide", " was lit"]
    with open_engine(bundle) as engine:
        scorer = Scorer(engine)
        likes = [max(range(3), key=lambda c: scorer.continuation(q, choices[c])[0]) for q in questions]
        answers = [*likes[:3], (likes[3] + 1) % 3]
        rows = [{"question": q, "choices": choices, "answer": a} for q, a in zip(questions, answers, strict=True)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "keeper.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
        found = run_tasks(engine, ["keeper"], folder=tmp_path)
        assert found["keeper"]["acc"] == 0.75
        assert run_tasks(engine, ["keeper"], limit=2, folder=tmp_path)["keeper"]["acc"] == 1.0
        with pytest.raises(UsageError, match="has no task 'nothing'"):
            run_tasks(engine, ["nothing"])


def test_traces_from_the_command_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.trace.safetensors"
    common = ["--slots-per-layer", "4", "--out", out, "--json", "--max-new-tokens", "6", "--ignore-eos"]
    assert edge("trace", bundle, "--prompt", "Hello", "--logits", "--hidden", *common) == 0
    said, trace = json.loads(capsys.readouterr().out), Trace.load(out)
    assert (said["tokens"], said["decode_tokens"], len(trace)) == (10, 5, 10)
    assert trace.decode.tolist() == [0] * 5 + [1] * 5
    assert trace.logits is not None and trace.hidden is not None
    best = np.argsort(-trace.logits.astype(np.float32), axis=-1)[..., :3]
    assert (np.sort(best, -1) == np.sort(trace.experts, -1)).mean() > 0.95
    (tmp_path / "a.txt").write_text(TEXT)
    read = ["--window", "30", "--routing", "cache-prior", *common[:4]]  # without the options of answers
    assert edge("trace", bundle, "--text", tmp_path / "a.txt", *read) == 0
    trace = Trace.load(out)
    assert (trace.info.kind, trace.info.source.name, trace.info.routing[:11]) == (
        "teacher-forced",
        "a.txt",
        "cache-prior",
    )
    assert [len(rows) for rows in trace.request_rows()] == [30, 30]
    assert edge("trace", bundle, "--workload", "own", "--prompts", "2", *common) == 0
    assert len(Trace.load(out).request_rows()) == 2


def test_simulated_tables_and_curves(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.trace.safetensors"
    (tmp_path / "a.txt").write_text(TEXT)
    assert edge("trace", bundle, "--text", tmp_path / "a.txt", "--slots-per-layer", "4", "--out", out, "--logits") == 0
    capsys.readouterr()
    plot = tmp_path / "curves.svg"
    assert edge("simulate", out, "--plot", plot, "--device", "orin-nx-16gb") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "policy"
    assert len(lines) == 1 + 6 * 5  # sizes 3, 4, 5, 6, 9
    assert plot.read_text().lstrip().startswith("<?xml")
    assert edge("simulate", out, "--scope", "shared", "--slots", "6", "12", "--cache", "warm", "--json") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(r["policy"], r["slots"]) for r in results] == [
        (policy, slots)
        for slots, policy in itertools.product((6, 12), ("lru", "lfu", "lfru", "fifo", "gate", "belady"))
    ]
    assert all(0 < r["share_of_optimum"] <= 1 for r in results)
    assert edge("simulate", out, "--slots", "4", "--routing", "cache-prior", "--prior-strength", "1", "--json") == 0
    captured = capsys.readouterr()
    prior = json.loads(captured.out)["results"]
    assert "open loop" in captured.err
    assert [r["policy"] for r in prior] == ["lru", "lfu", "lfru", "fifo", "gate"]
    assert all(r["agreement"] < 1 and r["share_of_optimum"] <= 1 for r in prior)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{here}/nothing.trace.safetensors"], "No such file"),
        (["{here}/broken"], "not a trace"),
        (["{trace}", "--slots", "2"], "2 slots per layer cannot hold the top 3"),
        (["{trace}", "--scope", "shared", "--slots", "5"], "smaller than one token cycle of 6"),
        (["{trace}", "--policy", "clock"], "unknown policy 'clock' (known: lru, lfu, lfru, fifo, gate, belady)"),
        (["{trace}", "--policy", "gate"], "record it with `edge trace --logits`"),
        (["{trace}", "--routing", "cache-prior"], "record it with `edge trace --logits`"),
        (["{trace}", "--prior-top-j", "2"], "need --routing cache-prior"),
        (["{trace}", "--plot", "x.gif"], "ends in .svg or .png"),
        (["{trace}", "--device", "toaster"], "unknown device 'toaster'"),
    ],
)
def test_simulate_refuses_what_cannot_be(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    from tests.traces import written_trace

    plain = dataclasses.replace(written_trace([[[0, 1, 2], [3, 4, 5]]] * 4, 6), logits=None)
    plain.save(tmp_path / "t.trace.safetensors")
    (tmp_path / "broken").write_bytes(b"x" * 100)
    said = [word.format(here=tmp_path, trace=tmp_path / "t.trace.safetensors") for word in words]
    assert edge("simulate", *said) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--out", "/nowhere/t"], "no folder that can be written to"),
        (["--workload", "own", "--prompts", "0", "--out", "t"], "--prompts 0: expected at least 1"),
        (["--text", "{text}", "--chat", "--out", "t"], "--chat is for prompts"),
        (["--prompt", "a", "--max-new-tokens", "9999", "--out", "t"], "no prompt and answer fit"),
        (["--prompt", "a"], "required: --out"),
    ],
)
def test_trace_refuses_what_cannot_be(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    said = [word.format(text=tmp_path / "a.txt") for word in words]
    assert edge("trace", bundle, "--slots-per-layer", "4", *said) == 2
    assert message in capsys.readouterr().err
    assert not Path("t").exists()
