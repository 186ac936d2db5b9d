"""The parts of `make interop` that need no other engine: comparison, verdicts, reports, what is written for engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from demo.native import CHECKPOINT
from export.checkpoint import Checkpoint
from export.families import read_model
from interop import environments, llama_engine
from interop.__main__ import document, outcome, run
from interop.checks import gates_in_gguf, same_scores
from interop.compare import FP32, NARROW, Limits, agree, complaints
from interop.environments import Installer, Kind, NotRunError, last_words
from interop.lm_eval_engine import questions
from interop.observed import Observed, Request, next_scores, stack_rows
from interop.prepare import make_plain
from interop.report import remarks, table
from runtime.router_file import Provenance, gates_sha256, save_router


def observed(experts: list[list[list[int]]], scores: list[float], answers: list[int], leads: float = 1.0) -> Observed:
    """One text of two tokens in two layers, top-2; one answer."""
    return Observed(
        [np.array(experts)], [np.array(scores, np.float32)], [np.array([7])], [np.array(answers)],
        [np.full(len(answers), leads, np.float32)],
    )  # fmt: skip


TUNED = observed([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], [-1.0], [1, 2, 3, 4])
STOCK = observed([[[0, 9], [2, 3]], [[8, 9], [6, 8]]], [-2.0], [1, 5, 3, 4])


def test_the_tuned_router_followed_is_agreement() -> None:
    found = agree(TUNED, STOCK, TUNED, FP32)
    assert (found.choices, found.routing, found.routing_stock) == (8, 1.0, 0.5)  # 0; 2, 3; -; 6 are the stock's, too
    assert (found.answers, found.answers_stock, found.answer_tokens) == (1.0, 0.25, 4)
    assert (found.mean_score_gap, found.best) == (0.0, 1.0)
    assert complaints(found, FP32) == []


def test_an_engine_with_the_stock_router_is_no_agreement() -> None:
    found = agree(TUNED, STOCK, STOCK, FP32)
    assert (found.routing, found.routing_stock) == (0.5, 1.0)
    said = complaints(found, FP32)
    assert [line.split(",")[0] for line in said] == [
        "0.5000 of the choices equal",
        "as near to the stock router (1.0000) as to the tuned (0.5000)",
        "log-probabilities 1 apart on average",
        "1 answers part where nothing was close",
    ]


def test_a_tuned_router_that_changes_nothing_proves_nothing() -> None:
    assert complaints(agree(TUNED, TUNED, TUNED, FP32), FP32) == [
        "as near to the stock router (1.0000) as to the tuned (1.0000)"
    ]


@pytest.mark.parametrize(("lead", "wrong"), [(1e-3, 0), (1.0, 1)])
def test_answers_may_part_only_at_a_close_call(lead: float, wrong: int) -> None:
    reference = observed([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], [-1.0], [1, 2, 3, 4], lead)
    other = observed([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], [-1.0], [1, 2, 9, 9])
    found = agree(reference, STOCK, other, FP32)
    assert (found.answers, found.answers_wrong) == (0.5, wrong)
    assert agree(reference, STOCK, other, NARROW).answers_wrong == 0


def test_nan_and_other_shapes_are_no_agreement() -> None:
    broken = observed([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], [float("nan")], [1, 2, 3, 4])
    assert complaints(agree(TUNED, STOCK, broken, FP32), FP32) == [
        "log-probabilities nan apart on average, allowed 0.001"
    ]
    with pytest.raises(ValueError, match="the reference has"):
        agree(TUNED, STOCK, observed([[[0, 1], [2, 3]]], [-1.0], [1]), FP32)


def test_files_between_environments(tmp_path: Path) -> None:
    request = Request("folder", "float32", [[1, 2]], [[3]], 4)
    request.save(tmp_path / "r.json")
    assert Request.load(tmp_path / "r.json") == request
    TUNED.facts["vllm"] = "0.0"
    TUNED.save(tmp_path / "o.npz")
    found = Observed.load(tmp_path / "o.npz")
    assert found.facts == {"vllm": "0.0"}
    assert agree(TUNED, STOCK, found, FP32) == agree(TUNED, STOCK, TUNED, FP32)
    Observed([], [], [], [np.array([1])]).save(tmp_path / "o.npz")
    assert Observed.load(tmp_path / "o.npz").experts == []


def test_rows_of_layers_are_put_together() -> None:
    layers = [[np.array([[3, 1]]), np.array([[0, 2], [9, 9]])], [np.array([[5, 4], [7, 6]])]]
    assert stack_rows(layers, 2).tolist() == [[[1, 3], [4, 5]], [[0, 2], [6, 7]]]  # the third row was decoded
    with pytest.raises(RuntimeError, match="2 tokens seen, wanted 3"):
        stack_rows(layers, 3)


def test_scores_of_a_text() -> None:
    logits = np.log(np.array([[0.25, 0.75], [0.5, 0.5], [1.0, 1.0]])) + 3
    scores, best = next_scores(logits, [0, 0, 1])
    assert scores == pytest.approx(np.log([0.25, 0.5]))
    assert best[0] == 1


def test_results_in_words() -> None:
    ran = outcome(lambda: {"routing": 0.99987, "mean_score_gap": 1.2e-6, "complaints": [], "versions": {"vllm": "1"}})

    def missing() -> dict[str, Any]:
        raise NotRunError("no such wheel")

    def broken() -> dict[str, Any]:
        raise RuntimeError("no experts")

    results = {"a": ran, "b": outcome(missing), "c": outcome(broken)}
    assert [row[0] for row in table(results)] == ["engine", "a", "b", "c"]
    assert table(results)[1][1:6] == ["99.99 %", "-", "1.2e-06", "-", "-"]
    assert [row[-1] for row in table(results)] == ["result", "pass", "not run", "fail"]
    assert remarks(results) == ["a: vllm 1", "b: not run: no such wheel", "c: RuntimeError: no experts"]
    assert document("b", results["b"])["reason"] == "no such wheel"
    assert outcome(lambda: {"complaints": ["differs"]})["status"] == "fail"


def test_a_run_of_some_checks_leaves_the_results_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gap = 1e-6
    found: dict[str, Any] = {
        "engine": lambda bench: {"mean_score_gap": gap, "complaints": []},
        "engine bf16": lambda bench: {"mean_score_gap": float("nan"), "complaints": ["nan apart"]},
    }
    monkeypatch.setattr("interop.checks.CHECKS", found)
    monkeypatch.setattr("interop.prepare.prepare", lambda folder: None)
    results = tmp_path / "results"
    run(tmp_path, Installer(tmp_path, "torch"), list(found))
    other = (results / "engine-bf16.json").read_text()
    gap = 2e-6
    run(tmp_path, Installer(tmp_path, "torch"), ["engine"])
    assert json.loads((results / "engine.json").read_text())["mean_score_gap"] == 2e-6
    assert (results / "engine-bf16.json").read_text() == other
    kept = json.loads(other)
    assert (kept["check"], kept["status"], kept["mean_score_gap"]) == ("engine bf16", "fail", None)
    assert kept["date"].startswith("20") and kept["machine"]["versions"]["torch"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"python": (9, 0)}, "nothing needs Python 9.0, this is"),
        ({"free_bytes": 1 << 60}, "nothing needs 1099511627776 MiB in"),
    ],
)
def test_an_environment_that_cannot_be_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(Kind, "requirements", CHECKPOINT / "config.json")
    kind = Kind(**{"name": "nothing", "module": "m", "overlay": True, "free_bytes": 0, **changes})
    with pytest.raises(NotRunError, match=reason):
        Installer(tmp_path, "torch").python(kind)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_leaves_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = "print('ERROR: no such wheel\\nmore'); raise SystemExit(3)"
    with pytest.raises(NotRunError, match="exit code 3: ERROR: no such wheel"):
        environments._call(["python3", "-c", words], log)
    log.write_text("one\ntwo\n")
    assert last_words(log) == "two"


def test_requirements_are_pinned() -> None:
    for kind in (environments.VLLM, environments.LLAMA, environments.LM_EVAL):
        lines = [line for line in kind.requirements.read_text().splitlines() if line and line[0] != "#"]
        assert lines
        assert all("==" in line for line in lines), kind.name


def test_the_variant_for_llama_has_the_same_gates(tmp_path: Path) -> None:
    make_plain(CHECKPOINT, tmp_path / "plain")
    before, after = load_file(CHECKPOINT / "model.safetensors"), load_file(tmp_path / "plain/model.safetensors")
    assert after.keys() - before.keys() == {"lm_head.weight"}
    assert torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert (config["norm_topk_prob"], config["tie_word_embeddings"]) == (False, False)


def test_gates_of_a_gguf_file_are_compared_bit_for_bit(tmp_path: Path) -> None:
    with Checkpoint.open(CHECKPOINT) as source:
        config = read_model(source.config, source.generation)
    gates = {f"layer_{n:02d}.weight": torch.randn(32, 192) for n in config.moe_layers}
    save_router(tmp_path / "r.safetensors", gates, Provenance(gates_sha256(gates), "model", "test"))
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2moe")
    for number, weight in enumerate(gates.values()):
        values = weight.numpy().copy()
        if number == 4:
            values[3, 5] = np.nextafter(values[3, 5], np.float32(9))
        writer.add_tensor(f"blk.{number}.ffn_gate_inp.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gates_in_gguf(tmp_path / "a.gguf", tmp_path / "r.safetensors", config) == [4]


def test_questions_have_their_own_ending_at_a_moving_place() -> None:
    verses = [" ".join(f"{name}{i}" for i in range(8)) for name in "abcdef"]
    rows = questions(["\n".join([*verses, "too short"])], 5)
    assert [row["question"] for row in rows] == [" ".join(f"{name}{i}" for i in range(5)) for name in "abcde"]
    assert [row["answer"] for row in rows] == [0, 1, 2, 3, 0]
    for name, row in zip("abcde", rows, strict=True):
        assert row["choices"][row["answer"]] == f" {name}5 {name}6 {name}7"
        assert len(set(row["choices"])) == 4


def test_accuracies_and_likelihoods_must_be_equal() -> None:
    names = ("engine_stock", "transformers_stock", "engine_tuned", "transformers_tuned")
    same = {**dict.fromkeys(names, 0.5), "largest_gap_stock": 1e-5, "largest_gap_tuned": 1e-5}
    assert same_scores(same) == []
    assert same_scores({**same, "engine_tuned": 0.25, "largest_gap_stock": float("nan")}) == [
        "stock router: log-likelihoods nan apart, allowed 0.001",
        "tuned router: 0.25 right on our engine, 0.5 on transformers",
    ]


def test_structures_lie_as_in_llama_h() -> None:
    """Offsets counted by hand from llama.h: seven uint32, seven int32, six floats, yarn_orig_ctx, defrag_thold."""
    params = llama_engine.ContextParams
    assert (params.flash_attn_type.offset, params.cb_eval.offset, params.type_k.offset) == (52, 88, 104)
    assert llama_engine.Batch.logits.offset == 48
    assert llama_engine.Tensor.ne.offset == 16
    assert Limits() == FP32
