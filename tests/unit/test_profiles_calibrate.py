"""edge calibrate: figures that are known come out of the records again, and the profile that it writes is one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edge import calibrate
from edge.cli import main
from export.families import read_model
from profiles import calibration
from profiles.calibration import FEW, LARGE, MANY, MEDIUM, MODELS, Models, Rates, Runs, cache_sizes, measure
from profiles.calibration_fit import Host, calibrated, step_costs
from profiles.costs import device_costs, layer_times
from profiles.device import STREAMING as STREAMING_FIELDS
from profiles.device import Device, Figure, Overheads, ReadRate, Storage, Streaming, load_device, parse_device
from profiles.device_file import to_toml
from profiles.random_model import SyntheticOptions, config_json
from profiles.sizes import Sizes, model_sizes
from runtime.errors import EdgeError
from runtime.records import TokenRecord

DRIVE, MEMORY = 2e9, 10e9
TRUE = {"token_s": 500e-6, "block_s": 60e-6, "routing_s": 90e-6, "expert_s": 30e-6}
ROUTER, ASKING, MIXING = 40e-6, 30e-6, 20e-6  # what routing_s is made of: each stands in another field of a record
STREAMING = ((0.5, 400e-6, 50e-6), (0.6, 300e-6, 90e-6), (0.8, 0.0, 500e-6))  # from small blobs to large


def figure(value: float, how: str = "a test") -> Figure:
    return Figure(value, "measured", how)


def true_device() -> Device:
    rate = figure(DRIVE)
    return Device(
        name="t", title="T", ram_bytes=figure(8e9), system_bytes=figure(1e9), memory_read_bytes_per_s=figure(MEMORY),
        storage=Storage(rate, rate, rate), reads=tuple(ReadRate(1 << 20, depth, rate) for depth in (1, 8)),
        overheads=Overheads(**{name: figure(value) for name, value in TRUE.items()}),
        streaming=tuple(
            Streaming(sizes_of(model).blob_bytes, *map(figure, values))
            for model, values in zip((MANY, MEDIUM, LARGE), STREAMING, strict=True)
        ),
    )  # fmt: skip


def sizes_of(options: SyntheticOptions) -> Sizes:
    return model_sizes(read_model(config_json(options), {}), 512)


def decoded(options: SyntheticOptions, misses: list[int]) -> TokenRecord:
    """A token of an engine that behaves exactly as the costs say; every layer misses so many, the first ones."""
    sizes = sizes_of(options)
    costs = device_costs(sizes, true_device())
    missed = (misses * options.layers)[: options.layers]
    times = layer_times(costs, options.top_k, np.array(missed, dtype=float))
    head = sizes.head_bytes / MEMORY
    dense = costs.layer_s - TRUE["routing_s"] + costs.shared_s
    values = dict.fromkeys(TokenRecord.__dataclass_fields__, 0)
    return TokenRecord(**{
        **values, "hits": [options.top_k - m for m in missed], "misses": missed,
        "total_ms": 1000 * (costs.token_s + float(times.total_s.sum())),
        "dense_ms": 1000 * (head + options.layers * dense), "routing_ms": 1000 * options.layers * ROUTER,
        "expert_ms": 1000 * options.layers * (options.top_k * costs.expert_s + MIXING),
        "other_ms": 1000 * (TRUE["token_s"] + options.layers * ASKING),
        "wait_ms": 1000 * float(times.waiting_s.sum()),
        "read_busy_ms": 1000 * float(costs.read_s(np.array(missed, dtype=float)).sum()),
    })  # type: ignore[arg-type]  # fmt: skip


def runs_of(options: SyntheticOptions) -> Runs:
    missing = [] if options.top_k == FEW.top_k else [[decoded(options, misses)] * 3 for misses in ([1, 0], [2, 3], [5])]
    return Runs(sizes_of(options), [decoded(options, [0])] * 3, missing)


def runs() -> dict[str, Runs]:
    return {name: runs_of(options) for name, options in MODELS.items()}


HOST = Host("t", "T", 8_000_000_000, 1_000_000_000)
RATES = Rates({(1 << 20, depth): [DRIVE * f for f in (1.0, 0.5, 1.5)] for depth in (1, 8)})


def test_known_costs_come_out_again() -> None:
    found = calibrated(HOST, RATES, runs(), figure)
    assert found.overheads is not None
    assert found.memory_read_bytes_per_s.value == pytest.approx(MEMORY, rel=1e-6)
    for name, value in TRUE.items():
        assert getattr(found.overheads, name).value == pytest.approx(value, rel=1e-6), name
    for stream, values in zip(found.streaming, STREAMING, strict=True):
        assert [getattr(stream, name).value for name in STREAMING_FIELDS] == pytest.approx(values, abs=1e-12)
    storage = found.storage
    assert [storage.low.value, storage.typical.value, storage.high.value] == [DRIVE / 2, DRIVE, 1.5 * DRIVE]


@pytest.mark.parametrize(("options", "misses"), [(MEDIUM, [4, 0, 2, 1]), (LARGE, [6, 3]), (MANY, [0, 1, 7])])
def test_a_forecast_with_the_profile_gives_the_measured_time(options: SyntheticOptions, misses: list[int]) -> None:
    """The circle closes: what was calibrated on some cache sizes predicts another one."""
    device = calibrated(HOST, RATES, runs(), figure)
    wanted = decoded(options, misses)
    costs = device_costs(sizes_of(options), device)
    times = layer_times(costs, options.top_k, np.array(wanted.misses, dtype=float))
    assert 1000 * (costs.token_s + times.total_s.sum()) == pytest.approx(wanted.total_ms, rel=0.02)


def test_no_cost_comes_out_below_zero() -> None:
    """The two models with small experts say that more experts take less time: an expert then costs its bytes alone."""
    found = runs()
    quick = dataclasses.replace(found["many"].resident[0], expert_ms=found["few"].resident[0].expert_ms / 2)
    steps = step_costs([*(found[name] for name in ("few", "medium", "large")), dataclasses.replace(
        found["many"], resident=[quick])])  # fmt: skip
    assert steps.expert_s == 0.0 and steps.bytes_per_s > 0


def test_a_machine_too_busy_to_be_measured_is_told_so() -> None:
    """Every layer takes as long, however many bytes it has, but for larger models, where it takes a little less."""
    found = runs()
    for name, several in found.items():
        ms = several.sizes.layers * (0.1 if name in ("few", "many") else 0.09)
        record = dataclasses.replace(several.resident[0], dense_ms=ms, expert_ms=ms)
        found[name] = dataclasses.replace(several, resident=[record])
    with pytest.raises(EdgeError, match="no longer than the small ones: run it again"):
        calibrated(HOST, RATES, found, figure)


def test_cache_sizes_begin_with_all_experts() -> None:
    assert cache_sizes(MANY) == (32, 28, 20, 8) and cache_sizes(LARGE) == (16, 14, 12, 8) and cache_sizes(FEW) == (16,)


def test_a_profile_survives_its_file() -> None:
    device = calibrated(HOST, RATES, runs(), lambda value, how: Figure(value, "measured", f'by "{how}" µs'))
    assert parse_device(to_toml(device, "two\nlines"), "x.toml") == device
    for name in ("orin-nx-16gb", "agx-orin"):
        assert parse_device(to_toml(load_device(name), ""), "x.toml") == load_device(name)


SMALL = dataclasses.replace(LARGE, hidden_size=128, expert_size=512, shared_size=128, layers=2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "medium", SMALL)
    monkeypatch.setitem(MODELS, "large", dataclasses.replace(SMALL, expert_size=640))
    for name in ("few", "many"):
        monkeypatch.setitem(MODELS, name, dataclasses.replace(MODELS[name], layers=2))
    monkeypatch.setattr(calibration, "_TURN_TOKENS", 3)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_models_run_and_miss_as_meant(tmp_path: Path) -> None:
    models: Models = calibrate.build_models(tmp_path, lambda _: None)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.bundle" for name in MODELS}
    ticks: list[str] = []
    rates, found = measure(models, 1, 0.001, ticks.append)
    assert found.keys() == MODELS.keys() and len(ticks) == calibration.steps()
    assert {len(rounds) for rounds in rates.by_setting.values()} == {calibration.TURNS}
    for name, several in found.items():
        assert len(several.resident) == calibration.TURNS * 3
        assert sum(sum(record.misses) for record in several.resident) <= 2, name  # the prompt has asked for all
        counts = [sum(sum(record.misses) for record in records) for records in several.missing]
        assert counts == sorted(counts) and all(counts), name


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(calibrate, "measure", lambda *_: (RATES, runs()))  # real times would hang on what else runs
    out = tmp_path / "here.toml"
    assert main(["calibrate", str(tmp_path), "--out", str(out), "--seconds", "0.005", "--name", "bench"]) == 0
    text, talk = out.read_text(), capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["here.toml"]  # the scratch models are gone
    assert "fixed costs" in talk and "--device" in talk
    device = load_device(str(out))
    assert device.name == "bench" and len(device.reads) == len(RATES.by_setting)
    assert text.count('mark = "measured"') == text.count("source = ") and "edge calibrate: " in text
    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_json(LARGE)))
    assert main(["forecast", str(config), "--device", str(out), "--context", "64"]) == 0
    printed = capsys.readouterr()
    assert "TPOT, at least" not in printed.out and "with what edge calibrate measured" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "here.json"], "--out here.json: the name of a device profile ends in .toml"),
        (["--seconds", "0"], "--seconds 0.0: expected more than 0"),
        (["/proc/no/such"], "/proc/no/such: No such file or directory: name a folder you may write to"),
    ],
)
def test_refusals(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "_SCRATCH_BYTES", 1 << 60)
    assert main(["calibrate", str(tmp_path)]) == 2
    assert "the scratch models take" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
