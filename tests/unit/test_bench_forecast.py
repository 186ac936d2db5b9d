"""bench.forecast on small models: what is foreseen is what the engine reads, and every case is printed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bench import forecast
from export.exporter import export_bundle
from profiles.device import Device, Figure, Overheads, load_device
from tests.checkpoints import make_checkpoint

WIDE = {"max_position_embeddings": 600}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model that speaks, and one of another shape without a tokenizer."""
    folder = tmp_path_factory.mktemp("forecast")
    make_checkpoint(folder / "speaks", "qwen2_moe", tokenizer=True, vocab_size=300, **WIDE)
    make_checkpoint(folder / "random", "olmoe", **WIDE)
    for name in ("speaks", "random"):
        export_bundle(folder / name, folder / f"{name}.bundle")
    return {name: folder / f"{name}.bundle" for name in ("speaks", "random")}


def device(*_: object) -> Device:
    seconds = {name: Figure(1e-3, "assumed", "a test") for name in Overheads.__dataclass_fields__}
    return dataclasses.replace(load_device("orin-nx-8gb"), overheads=Overheads(**seconds))


def test_every_case_is_foreseen_and_measured(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(forecast, "build_models", lambda *_: None)
    monkeypatch.setattr(forecast, "_random_bundle", lambda *_: bundles["random"])
    monkeypatch.setattr(forecast, "calibrate_round", device)
    words = [str(bundles["speaks"]), "--rounds", "2", "--tokens", "4", "--out", str(tmp_path)]
    assert forecast.main(words) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)["settings"]
    # Top 3 of 7 experts: four slots, and half of them; top 3 of 10: four slots and five.
    assert [(row["name"], row["slots_per_layer"]) for row in rows] == [
        ("speaks, base", 4), ("speaks, base", 3), ("random, base", 4), ("random, base", 5),
    ]  # fmt: skip
    for row in rows:
        assert row["misses_predicted"] == row["misses_measured"] > 0
        assert row["measured_ms"] > 0 and len(row["errors"]) == 2
        # Three layers of 1 ms for the block and 1 ms for routing, and 1 ms per token, at the least.
        assert row["predicted_ms"] > 3 * 2 + 1
    assert sum("slots per layer" in line for line in lines) == 4
    assert any("of 4" in line for line in lines)
    assert list(tmp_path.iterdir()) == []
