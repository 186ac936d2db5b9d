"""What recording costs: both measurements on a small bundle, their sums by hand, and the engine's change of file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import record
from bench.record import RecordOptions
from export.exporter import export_bundle
from runtime.engine import Engine, EngineOptions, GenerateOptions
from runtime.errors import UsageError
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record")
    export_bundle(make_checkpoint(folder / "checkpoint", "qwen2_moe"), folder / "bundle")
    return folder / "bundle"


def types_of(path: Path) -> list[str]:
    return [json.loads(line)["type"] for line in path.read_text().splitlines()]


def test_runs_go_to_the_file_of_their_time(bundle: Path, tmp_path: Path) -> None:
    one = ["run", "prefill", "token", "end"]
    with Engine.open(bundle, EngineOptions(slots_per_layer=4, record=tmp_path / "a")) as engine:
        for path in ("b", None, "c"):
            list(engine.generate([5], GenerateOptions(2, ignore_eos=True)))
            engine.record_to(path and tmp_path / path)
        list(engine.generate([5], GenerateOptions(2, ignore_eos=True)))
        with pytest.raises(UsageError, match="No such file"):
            engine.record_to(tmp_path / "missing" / "d")
        list(engine.generate([5], GenerateOptions(2, ignore_eos=True)))
    assert {name: types_of(tmp_path / name) for name in "abc"} == {"a": one, "b": one, "c": one}


def test_both_measurements(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record.run(bundle, RecordOptions(tokens=3, rounds=2, threads=1))
    *_, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["line_share"] == pytest.approx(found["line_us"] / 1000 / found["tpot_off_ms"])
    assert 300 < found["line_bytes"] < 1500
    low, high = found["difference_quartiles"]
    assert low <= found["difference"] <= high
    assert not list(bundle.parent.glob("tmp*")), "a record was left behind"


def test_too_little_to_compare_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record.main([str(bundle), "--rounds", "1"]) == 2
    assert "expected at least 2" in capsys.readouterr().err
