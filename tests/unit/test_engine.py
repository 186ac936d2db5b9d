"""The engine's surface: options, refusals, stop reasons, records that add up, and runs that are cut short."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from export.exporter import export_bundle
from runtime import native
from runtime.engine import Engine, EngineOptions, GenerateOptions
from runtime.errors import BudgetError, BundleError, ReadError, UsageError
from tests.checkpoints import make_checkpoint

IDS = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    checkpoint = make_checkpoint(folder / "checkpoint", "qwen2_moe", tokenizer=True, vocab_size=260)
    export_bundle(checkpoint, folder / "bundle")
    return folder / "bundle"


def run(bundle: Path, new: int = 6, prompt: Any = IDS, generate: dict[str, Any] | None = None, **options: Any):  # type: ignore[no-untyped-def]
    with Engine.open(bundle, EngineOptions(slots_per_layer=4, context=64, **options)) as engine:
        tokens = list(engine.generate(prompt, GenerateOptions(new, **(generate or {}))))
        return tokens, engine.report()


def test_a_record_adds_up_and_is_complete(bundle: Path, tmp_path: Path) -> None:
    tokens, report = run(bundle, new=5, generate={"ignore_eos": True}, record=tmp_path / "run.jsonl")
    header, *lines, end = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [header["type"], end["type"]] == ["run", "end"]
    assert [line["type"] for line in lines] == ["prefill"] + ["token"] * 4
    assert [line["token_id"] for line in lines] == [t.id for t in tokens] == report["token_ids"]
    for line in lines:
        parts = sum(line[f"{part}_ms"] for part in ("dense", "routing", "wait", "expert", "other"))
        assert parts == pytest.approx(line["total_ms"], rel=0.02)
        assert min(line[f"{part}_ms"] for part in ("dense", "routing", "wait", "expert", "other")) >= 0
        assert len(line["hits"]) == len(line["misses"]) == 3
        assert line["read_busy_ms"] <= line["total_ms"] + 1
    for line in lines[1:]:
        assert [h + m for h, m in zip(line["hits"], line["misses"], strict=True)] == [3, 3, 3]
        # A blob is 3 x 40 x 64 fp16 values, padded to whole pages.
        assert line["bytes"] - line["wasted_bytes"] == sum(line["misses"]) * 16384
        assert [len(set(ids)) for ids in line["experts"]] == [3, 3, 3]
    for line in lines:
        assert [len(ids) for ids in line["missed"]] == line["misses"]
        assert all(set(missed) <= set(ids) for missed, ids in zip(line["missed"], line["experts"], strict=True))
    assert header["cache"] == "cold"
    assert header["reader"] == report["reader"] == ("compiled" if native.library() else "python")
    assert header["machine"]["versions"]["torch"]
    assert end["finish_reason"] == "length"
    times = sorted(line["total_ms"] for line in lines[1:])
    assert end["tpot_ms"]["median"] == pytest.approx((times[1] + times[2]) / 2)
    assert end["tpot_ms"]["p95"] == times[3]
    assert end["expert_bytes_per_token"] == sum(line["bytes"] for line in lines[1:]) / 4


def test_the_documentation_names_every_field(bundle: Path, tmp_path: Path) -> None:
    run(bundle, new=2, record=tmp_path / "run.jsonl")
    page = (Path(__file__).parents[2] / "docs/records.md").read_text()
    for line in (tmp_path / "run.jsonl").read_text().splitlines():
        for field in json.loads(line):
            assert f"`{field}`" in page or field == "type", field


def test_an_interrupted_run_closes_its_record(bundle: Path, tmp_path: Path) -> None:
    with Engine.open(bundle, EngineOptions(slots_per_layer=4, record=tmp_path / "run.jsonl")) as engine:
        stream = engine.generate(IDS, GenerateOptions(50, ignore_eos=True))
        first = [next(stream).id, next(stream).id]
        stream.close()  # what leaving a for loop does
        engine.check_integrity()
        again = [t.id for t in engine.generate(IDS, GenerateOptions(2))]
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines] == ["run", "prefill", "token", "end", "run", "prefill", "token", "end"]
    assert lines[3]["finish_reason"] == "interrupted"
    assert lines[4]["cache"] == "warm"
    assert lines[5]["read_busy_ms"] <= lines[5]["total_ms"]
    assert first == again


def test_a_conversation_goes_on_where_it_stopped(bundle: Path) -> None:
    with Engine.open(bundle, EngineOptions(slots_per_layer=4, dtype="fp32")) as engine:
        answer = [t.id for t in engine.generate(IDS, GenerateOptions(5, ignore_eos=True))]
        longer = [*IDS, *answer, 9, 10]
        again = GenerateOptions(5, ignore_eos=True, reuse_prefix=True)
        continued = [t.id for t in engine.generate(longer, again)]
        assert engine.summary().reused_tokens == len(IDS) + 4  # the last answer token was never an input
        assert engine.generate(longer, again).__next__().id == continued[0]
        assert engine.summary().reused_tokens == len(longer) - 1
        assert [t.id for t in engine.generate(longer, GenerateOptions(5, ignore_eos=True))] == continued
        assert engine.summary().reused_tokens == 0


def test_end_of_text_stops_unless_ignored(bundle: Path) -> None:
    free, _ = run(bundle, new=40, generate={"ignore_eos": True})
    third = free[2].id
    with Engine.open(bundle, EngineOptions(slots_per_layer=4)) as engine:
        engine.config = dataclasses.replace(engine.config, eos_token_ids=(third,))
        stopped = list(engine.generate(IDS, GenerateOptions(40)))
        assert engine.summary().finish_reason == "eos"
    assert [t.id for t in stopped] == [t.id for t in free[: len(stopped)]]
    assert stopped[-1].id == third


def test_a_seed_repeats_and_another_differs(bundle: Path) -> None:
    sampled = [
        [t.id for t in run(bundle, 12, generate={"temperature": 2.0, "seed": seed, "ignore_eos": True})[0]]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_text_in_text_out_equals_ids(bundle: Path) -> None:
    with Engine.open(bundle, EngineOptions(slots_per_layer=4)) as engine:
        ids = engine.encode("Hello")
        from_text = list(engine.generate("Hello", GenerateOptions(6, ignore_eos=True)))
        from_ids = list(engine.generate(ids, GenerateOptions(6, ignore_eos=True)))
        assert [t.id for t in from_text] == [t.id for t in from_ids]
        assert "".join(t.text for t in from_text) == engine.summary().text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots_per_layer": 2}, "2 slots per layer cannot hold the top 3"),
        ({"expert_memory_bytes": 100_000}, "layers x 3 slots"),
        ({"expert_memory_bytes": 100_000, "scope": "shared"}, "smaller than one token cycle of 9"),
        ({"slots_per_layer": 4, "context": 1 << 20}, "this model allows 256 tokens"),
        ({"slots_per_layer": 4, "policy": "belady"}, "unknown policy 'belady' \\(known: lru, lfu, lfru, fifo, gate\\)"),
        ({"slots_per_layer": 4, "dtype": "int8"}, "unknown dtype 'int8'"),
        ({"slots_per_layer": 4, "router": "chat"}, "no router 'chat' \\(in the bundle: base"),
        ({"slots_per_layer": 4, "backend": "tensorrt"}, "TensorRT|no NVIDIA GPU"),
        ({"slots_per_layer": 4, "backend": "metal"}, "unknown back-end 'metal'"),
        ({"slots_per_layer": 4, "expert_memory_bytes": 1 << 20}, "give one of them"),
        ({"slots_per_layer": 4, "read_threads": 0}, "--read-threads 0: expected at least 1"),
        ({"slots_per_layer": 4, "record": Path("/nowhere/run.jsonl")}, "--record /nowhere/run.jsonl: No such file"),
    ],
)
def test_impossible_options_are_refused(bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((BudgetError, UsageError), match=message):
        Engine.open(bundle, EngineOptions(**options))


@pytest.mark.parametrize(
    ("prompt", "generate", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([5, 260], {}, "token id 260 is not in the vocabulary of 260"),
        (IDS, {"max_new_tokens": 61}, "need a context of 65, but it is 64"),
        (IDS, {"max_new_tokens": 0}, "expected at least 1"),
        (IDS, {"top_p": 1.5}, "top_p is 1.5"),
        (IDS, {"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_impossible_requests_are_refused(bundle: Path, prompt: Any, generate: dict[str, Any], message: str) -> None:
    with Engine.open(bundle, EngineOptions(slots_per_layer=4, context=64)) as engine:
        with pytest.raises(UsageError, match=message):
            engine.generate(prompt, GenerateOptions(**generate))
        assert len(list(engine.generate(IDS, GenerateOptions(2, ignore_eos=True)))) == 2


def test_a_blob_cut_short_while_open_fails_the_request_and_only_that(bundle: Path) -> None:
    with Engine.open(bundle, EngineOptions(slots_per_layer=3)) as engine:
        whole = [t.id for t in engine.generate(IDS, GenerateOptions(8, ignore_eos=True))]
        engine.empty_cache()
        blobs = sorted((bundle / "experts/layer_01").iterdir())
        saved = [blob.read_bytes() for blob in blobs]
        for blob in blobs:
            blob.write_bytes(b"")
        with pytest.raises(ReadError, match=r"experts/layer_01/expert_\d+.fp16"):
            list(engine.generate(IDS, GenerateOptions(8, ignore_eos=True)))
        assert engine.summary().finish_reason == "error"
        engine.check_integrity()
        for blob, content in zip(blobs, saved, strict=True):
            blob.write_bytes(content)
        assert [t.id for t in engine.generate(IDS, GenerateOptions(8, ignore_eos=True))] == whole


def test_closing_and_refusing_leave_nothing_open(bundle: Path) -> None:
    """An engine holds its bundle's folder and 3 x 7 experts."""

    def held() -> int:
        links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
        return sum(os.readlink(link).startswith(str(bundle)) for link in links if os.path.islink(link))

    with Engine.open(bundle, EngineOptions(slots_per_layer=4)) as engine:
        assert held() == 22
        engine.close()
        assert held() == 0
    for wrong in ({"slots_per_layer": 2}, {"router": "chat"}, {"record": Path("/nowhere/run.jsonl")}):
        with pytest.raises((BudgetError, UsageError)):
            Engine.open(bundle, EngineOptions(**{"slots_per_layer": 4, **wrong}))
        assert held() == 0, wrong


def test_the_first_token_is_not_charged_for_what_ran_before_it(bundle: Path) -> None:
    with Engine.open(bundle, EngineOptions(slots_per_layer=4)) as engine:
        for _ in range(3):
            engine.logits(IDS * 10)
        record = next(engine.generate(IDS, GenerateOptions(2))).record
    assert record.other_ms >= 0


def test_a_record_that_was_closed_stays_as_it_is(bundle: Path, tmp_path: Path) -> None:
    """A run that another record interrupts writes into neither any more."""
    with Engine.open(bundle, EngineOptions(slots_per_layer=4, record=tmp_path / "one.jsonl")) as engine:
        tokens = engine.generate(IDS, GenerateOptions(9, ignore_eos=True))
        next(tokens)
        engine.record_to(tmp_path / "two.jsonl")
        tokens.close()
    assert [json.loads(line)["type"] for line in (tmp_path / "one.jsonl").read_text().splitlines()] == ["run"]
    assert (tmp_path / "two.jsonl").read_text() == ""


def test_no_bundle_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle: make one with `edge export CHECKPOINT"):
        Engine.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match="not a bundle, or an export that did not finish"):
        Engine.open(tmp_path)
