"""Recorded routing in the engine: exactly the recorded experts, the misses that the simulator predicts, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.exporter import export_bundle
from remoe.record import info_of, record_generation, watching
from remoe.simulate import Setting, simulate
from remoe.trace import Origin, Trace
from runtime.engine import Engine, EngineOptions, GenerateOptions
from runtime.errors import UsageError
from runtime.records import TokenRecord
from runtime.replay import Steps
from tests.checkpoints import make_checkpoint
from tests.traces import random_trace

LENGTHS = [(5, 6), (1, 7), (3, 4)]  # prompt tokens and decode steps
EXPERTS, TOP_K, LAYERS = 10, 3, (0, 1, 2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    export_bundle(make_checkpoint(folder / "checkpoint", "olmoe"), folder / "b.bundle")
    return folder / "b.bundle"


def open_engine(bundle: Path, slots: int = 4, **changes: Any) -> Engine:
    return Engine.open(bundle, EngineOptions(slots_per_layer=slots, context=64, dtype="fp32", **changes))


def steps_of(trace: Trace, request: int) -> Steps:
    rows = trace.request_rows()[request]
    of = slice(rows.start, rows.stop)
    return Steps(trace.info.moe_layers, trace.info.num_experts, trace.experts[of], trace.weights[of])


def foreign_trace(**changes: Any) -> Trace:
    """Of a model with the bundle's shape, which routes nothing like it."""
    return random_trace(LENGTHS, len(LAYERS), EXPERTS, TOP_K, seed=3, moe_layers=LAYERS, **changes)


def replay(engine: Engine, trace: Trace, request: int, prompt: int, cold: bool = True) -> list[TokenRecord]:
    """Records of a whole request: the prefill of its first `prompt` tokens, then one per further row."""
    steps = steps_of(trace, request)
    engine.replay(steps)
    if cold:
        engine.empty_cache()
    options = GenerateOptions(len(steps) - prompt + 1, ignore_eos=True)
    return [token.record for token in engine.generate(list(range(7, 7 + prompt)), options)]


def test_asks_for_exactly_what_was_recorded(bundle: Path) -> None:
    trace = foreign_trace()
    with open_engine(bundle) as engine:
        for number, rows in enumerate(trace.request_rows()):
            prompt = LENGTHS[number][0]
            records = replay(engine, trace, number, prompt)
            decode = [trace.experts[row].tolist() for row in rows][prompt:]
            assert [record.experts for record in records[1:]] == decode
            asked = [set(trace.experts[rows.start : rows.start + prompt, layer].ravel().tolist()) for layer in LAYERS]
            assert [set(ids) for ids in records[0].experts] == asked


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize(("scope", "policy"), [("layer", "lru"), ("layer", "lfru"), ("shared", "lfu")])
def test_misses_are_those_of_the_simulator(bundle: Path, scope: Any, policy: str, cold: bool) -> None:
    trace = foreign_trace()
    with open_engine(bundle, scope=scope, policy=policy) as engine:
        total = engine.slots.total
        found = [replay(engine, trace, number, LENGTHS[number][0], cold) for number in range(len(LENGTHS))]
    slots: dict[str, Any] = {"slots_per_layer": 4} if scope == "layer" else {"shared_slots": total}
    result = simulate(trace, Setting(policy, **slots, cold=cold))
    missed = [record.misses for records in found for record in records[1:]]
    assert missed == result.missed[trace.decode == 1].tolist()
    assert [records[0].misses for records in found] == result.prompt_misses.tolist()
    assert sum(map(sum, missed)) > 0


def test_text_without_a_prompt_begins_with_a_lone_token(bundle: Path) -> None:
    """Rows that are all decode steps: the first is the prompt of one token, and reads what the simulator says."""
    trace = dataclasses.replace(foreign_trace(), decode=np.ones(sum(map(sum, LENGTHS)), np.uint8))
    with open_engine(bundle) as engine:
        records = replay(engine, trace, 0, prompt=1)
    missed = simulate(trace, Setting("lru", 4)).missed[: sum(LENGTHS[0])]
    assert [record.misses for record in records] == missed.tolist()


def test_own_recording_gives_the_same_tokens(bundle: Path) -> None:
    """Experts, their order and weights come from the recording: fp16 weights change the logits a little, no more."""
    with open_engine(bundle) as engine:
        with watching(engine) as watcher:
            block = record_generation(engine, watcher, 0, [5, 6, 7], GenerateOptions(8, ignore_eos=True))
        assert block is not None
        trace = Trace.from_blocks(info_of(engine, "generated", Origin("prompts", "0" * 64)), [block])
        ids = [5, 6, 7, *engine.summary().token_ids[:-1]]
        stock = engine.logits(ids)
        engine.replay(steps_of(trace, 0))
        torch.testing.assert_close(engine.logits(ids), stock, rtol=1e-2, atol=1e-2)
        engine.replay(dataclasses.replace(steps_of(trace, 0), weights=np.zeros_like(trace.weights)))
        assert (engine.logits(ids) - stock).abs().max() > 0.1  # the weights are those given


def test_what_is_replayed_is_what_is_seen_and_reported(bundle: Path) -> None:
    """A recording of a replay is the recording; the settings say "replay" until a router takes over."""
    trace = foreign_trace()
    with open_engine(bundle) as engine:
        engine.replay(steps_of(trace, 0))
        with watching(engine) as watcher:
            block = record_generation(engine, watcher, 0, [1, 2, 3, 4, 5], GenerateOptions(7, ignore_eos=True))
        assert block is not None
        assert block.experts.tolist() == trace.experts[:11].tolist()
        assert np.array_equal(block.weights, trace.weights[:11].astype(np.float32))
        assert (engine.report()["routing"], engine.report()["prefetch"]) == ("replay", 0)
        engine.use_router("base")
        list(engine.generate([1, 2], GenerateOptions(2)))
        assert (engine.report()["routing"], engine.report()["prefetch"]) == ("stock", 1)


def test_every_sequence_begins_with_the_first_row(bundle: Path) -> None:
    trace = foreign_trace()
    with open_engine(bundle) as engine:
        engine.replay(steps_of(trace, 1))
        for count in (3, 8):
            tokens = list(engine.generate([9], GenerateOptions(count, ignore_eos=True)))
            assert [t.record.experts for t in tokens] == trace.experts[11 : 11 + count].tolist()


def test_a_sequence_longer_than_the_recording_fails_and_the_next_one_works(bundle: Path) -> None:
    trace = foreign_trace()
    with open_engine(bundle) as engine:
        engine.replay(steps_of(trace, 2))
        with pytest.raises(UsageError, match="the recorded routing is of 7 tokens, but token 8 was reached"):
            list(engine.generate([1, 2, 3], GenerateOptions(6, ignore_eos=True)))
        engine.check_integrity()
        assert len(list(engine.generate([1, 2, 3], GenerateOptions(5, ignore_eos=True)))) == 5


@pytest.mark.parametrize(
    ("layers", "experts", "top_k", "numbers", "found"),
    [
        (3, 12, 3, LAYERS, "top 3 of 12 experts in 3 layers"),
        (3, 10, 2, LAYERS, "top 2 of 10 experts in 3 layers"),
        (2, 10, 3, (0, 1), "top 3 of 10 experts in 2 layers"),
        (3, 10, 3, (1, 2, 3), r"in 3 layers \(layers 1 to 3\)"),
    ],
)
def test_refuses_a_recording_of_another_shape(
    bundle: Path, layers: int, experts: int, top_k: int, numbers: tuple[int, ...], found: str
) -> None:
    trace = random_trace([(2, 2)], layers, experts, top_k, moe_layers=numbers)
    with open_engine(bundle) as engine:
        before = engine.decoder.router
        wanted = r"the bundle has the top 3 of 10 experts in 3 layers \(layers 0 to 2\)"
        with pytest.raises(UsageError, match=f"{found}.*{wanted}"):
            steps_of(trace, 0).check(engine.config)
        with pytest.raises(UsageError, match="recorded from a model with"):
            engine.replay(steps_of(trace, 0))
        assert type(engine.decoder.router) is type(before)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[[0, 1, 10]] * 3], "not one of 0 to 9"),
        ([[[0, 1, -1]] * 3], "not one of 0 to 9"),
        ([[[4, 1, 4]] * 3], "names one expert twice"),
        (np.zeros((0, 3, 3), int), r"experts \[0, 3, 3\]"),
        ([[0, 1, 2]], r"experts \[1, 3\]"),
    ],
)
def test_refuses_what_is_no_routing(bundle: Path, rows: Any, message: str) -> None:
    experts = np.array(rows)
    with open_engine(bundle) as engine, pytest.raises(UsageError, match=message):
        engine.replay(Steps(LAYERS, EXPERTS, experts, np.ones(experts.shape)))
