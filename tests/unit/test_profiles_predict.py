"""TPOT of a trace on a device: simulated misses and the costs of the device, by hand and through the commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edge.cli import main
from export.families import read_model
from profiles.device import Device, Figure, Storage, load_device
from profiles.predict import predict, trace_misses
from profiles.random_model import SyntheticOptions, config_json
from profiles.sizes import Sizes, model_sizes
from remoe.synthetic import SyntheticRouting, synthetic_trace
from remoe.trace import Trace
from runtime.config import ModelConfig
from runtime.errors import UsageError

SHAPE = SyntheticOptions(
    layers=2, vocab_size=64, hidden_size=64, num_experts=8, top_k=2, expert_size=64, shared_size=64, num_heads=4
)
BLOB = 3 * 64 * 64 * 2  # 24,576 bytes: six pages


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return read_model(config_json(SHAPE), {})


def trace_of(config: ModelConfig, overlap: float = 0.5) -> Trace:
    return synthetic_trace(config, SyntheticRouting(overlap, ((3, 50), (0, 50))))


def board(low: float, typical: float, high: float) -> Device:
    rates = [Figure(rate, "assumed", "a test") for rate in (low, typical, high)]
    memory = Figure(1e12, "assumed", "a test")
    return dataclasses.replace(load_device("orin-nx-16gb"), storage=Storage(*rates), memory_read_bytes_per_s=memory)


def test_reading_alone_by_hand(config: ModelConfig) -> None:
    """With memory a thousand times faster than the drive a token takes what its misses take."""
    misses = np.array([[2, 1], [0, 0], [1, 0]], dtype=np.uint8)
    found = predict(model_sizes(config, 8), board(1e6, 2e6, 4e6), misses)
    one_ms = 1000 * BLOB / 2e6
    assert found.tpot_ms == pytest.approx([3 * one_ms, 0, one_ms], abs=0.01)
    assert found.waiting_ms == pytest.approx([3 * one_ms, 0, one_ms], abs=0.01)
    assert found.fast_ms == pytest.approx([1.5 * one_ms, 0, 0.5 * one_ms], abs=0.01)
    assert found.slow_ms == pytest.approx([6 * one_ms, 0, 2 * one_ms], abs=0.01)


def test_misses_of_a_trace_are_those_of_its_decode_steps(config: ModelConfig) -> None:
    sizes = model_sizes(config, 8)
    misses = trace_misses(trace_of(config), sizes)
    assert misses(2).shape == (100, 2)
    # With two slots LRU keeps what the token before had: half of the experts, but for the first step of the second
    # request, whose cache is empty, and the first of the first, whose last prompt token counts like any other.
    assert misses(2).sum() == pytest.approx(0.5 * 100 * 2 * 2, abs=12)
    assert misses(8).sum() < misses(4).sum() < misses(2).sum()


def test_another_models_trace_is_refused(config: ModelConfig) -> None:
    other: Sizes = dataclasses.replace(model_sizes(config, 8), experts=16)
    with pytest.raises(
        UsageError, match=r"has 2 layers, top 2 of 8 experts, 24576 .* this model has 2 layers, top 2 of 16"
    ):
        trace_misses(trace_of(config), other)


@pytest.fixture
def files(config: ModelConfig, tmp_path: Path) -> tuple[str, str]:
    trace, model = tmp_path / "t.trace.safetensors", tmp_path / "config.json"
    trace_of(config).save(trace)
    model.write_text(json.dumps(config_json(SHAPE)))
    return str(trace), str(model)


def test_simulate_and_forecast_agree(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    trace, model = files
    words = [
        "simulate",
        trace,
        "--device",
        "orin-nx-8gb",
        "--model",
        model,
        "--slots",
        "3",
        "--policy",
        "lru",
        "--json",
    ]
    assert main(words) == 0
    printed = capsys.readouterr()
    simulated = json.loads(printed.out)["results"][0]
    assert "TPOT on orin-nx-8gb is a floor" in printed.err
    words = ["forecast", model, "--device", "orin-nx-8gb", "--trace", trace, "--slots-per-layer", "3", "--json"]
    assert main(words) == 0
    usual = json.loads(capsys.readouterr().out)
    assert usual["fit"]["slots"] == 3
    assert usual["usual"]["tpot_ms"] == pytest.approx(simulated["tpot_ms"]["tpot"])
    assert usual["best"]["tpot_ms"] == pytest.approx(simulated["tpot_ms"]["fast"])
    assert usual["worst"]["tpot_ms"] == pytest.approx(simulated["tpot_ms"]["slow"])
    assert usual["usual"]["hit_rate"] == pytest.approx(simulated["unique_hit_rate"])
    assert usual["usual"]["overlap"] is None


def test_the_table_has_a_range(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    trace, model = files
    assert main(["simulate", trace, "--device", "orin-nx-8gb", "--model", model, "--slots", "2"]) == 0
    assert "TPOT, ms (fast to slow drive)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["simulate", "TRACE", "--model", "MODEL"], "--model tells TPOT on a device: name it with --device"),
        (
            ["forecast", "MODEL", "--device", "agx-orin", "--trace", "TRACE", "--overlap", "0.1"],
            "say the same thing twice",
        ),
        (
            ["forecast", "MODEL", "--device", "agx-orin", "--slots-per-layer", "1"],
            "--slots-per-layer 1: a token needs 2",
        ),
        (["forecast", "MODEL", "--device", "agx-orin", "--slots-per-layer", "9"], "8 fit beside the rest on agx-orin"),
    ],
)
def test_refusals(words: list[str], message: str, files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    names = {"TRACE": files[0], "MODEL": files[1]}
    assert main([names.get(word, word) for word in words]) == 2
    assert message in capsys.readouterr().err
