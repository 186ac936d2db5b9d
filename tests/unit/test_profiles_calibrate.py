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
from profiles.calibration import FEW, LARGE, MANY, MEDIUM, Decoded, Host, Models, Rates, calibrated, measure_engine
from profiles.costs import device_costs, layer_times
from profiles.device import Device, Figure, Overheads, ReadRate, Storage, Streaming, load_device, parse_device
from profiles.device_file import to_toml
from profiles.random_model import SyntheticOptions, config_json
from profiles.sizes import Sizes, model_sizes
from runtime.errors import EdgeError
from runtime.records import TokenRecord

DRIVE, MEMORY = 2e9, 10e9
TRUE = {"token_s": 500e-6, "block_s": 60e-6, "routing_s": 50e-6, "expert_s": 30e-6, "miss_s": 100e-6}
STREAMING = ((0.5, 0.6), (0.6, 0.5), (0.8, 0.25))  # read share and overlap loss of blobs, from small to large


def figure(value: float, how: str = "a test") -> Figure:
    return Figure(value, "measured", how)


def true_device() -> Device:
    rate = figure(DRIVE)
    return Device(
        name="t", title="T", ram_bytes=figure(8e9), system_bytes=figure(1e9), memory_read_bytes_per_s=figure(MEMORY),
        storage=Storage(rate, rate, rate), reads=tuple(ReadRate(1 << 20, depth, rate) for depth in (1, 8)),
        overheads=Overheads(**{name: figure(value) for name, value in TRUE.items()}),
        streaming=tuple(
            Streaming(sizes_of(model).blob_bytes, figure(share), figure(loss))
            for model, (share, loss) in zip((calibration.SMALL, MEDIUM, LARGE), STREAMING, strict=True)
        ),
    )  # fmt: skip


def sizes_of(options: SyntheticOptions) -> Sizes:
    return model_sizes(read_model(config_json(options), {}), 512)


def decoded(options: SyntheticOptions, misses: list[int]) -> Decoded:
    """Tokens of an engine that behaves exactly as the costs say; `misses` are those of the first layers."""
    sizes, device = sizes_of(options), true_device()
    costs = device_costs(sizes, device)
    missed = misses + [0] * (options.layers - len(misses))
    times = layer_times(costs, options.top_k, np.array(missed, dtype=float))
    routing = TRUE["routing_s"] - 20e-6  # of which putting outputs together, a part of expert_ms, takes 20 us
    expert = options.top_k * costs.expert_s + 20e-6
    dense = costs.layer_s - TRUE["routing_s"] + costs.shared_s
    values = dict.fromkeys(TokenRecord.__dataclass_fields__, 0)
    record = TokenRecord(**{
        **values, "hits": [options.top_k - m for m in missed], "misses": missed,
        "total_ms": 1000 * (costs.token_s + float(times.total_s.sum())),
        "dense_ms": 1000 * options.layers * dense, "routing_ms": 1000 * options.layers * routing,
        "expert_ms": 1000 * options.layers * expert, "other_ms": 1000 * TRUE["token_s"],
        "wait_ms": 1000 * float(times.waiting_s.sum()),
        "read_busy_ms": 1000 * float(costs.read_s(np.array(missed, dtype=float)).sum()),
    })  # type: ignore[arg-type]  # fmt: skip
    return Decoded(sizes, [record] * 3)


def runs() -> dict[str, Decoded]:
    return {
        "few": decoded(FEW, []), "many": decoded(MANY, []), "large": decoded(LARGE, []),
        "few, missing": decoded(FEW, [2] * 8), "large, missing": decoded(LARGE, [4, 4, 3, 4]),
        "large, half missing": decoded(LARGE, [2, 1, 0, 3]), "medium, missing": decoded(MEDIUM, [4, 4, 4, 4]),
        "medium, half missing": decoded(MEDIUM, [2, 1, 0, 3]), "small, missing": decoded(calibration.SMALL, [8] * 4),
        "small, half missing": decoded(calibration.SMALL, [2, 5, 0, 3]),
    }  # fmt: skip


HOST = Host("t", "T", 8_000_000_000, 1_000_000_000)
RATES = Rates({(1 << 20, depth): [DRIVE * f for f in (1.0, 0.5, 1.5)] for depth in (1, 8)})


def test_known_costs_come_out_again() -> None:
    found = calibrated(HOST, RATES, runs(), figure)
    assert found.overheads is not None
    assert found.memory_read_bytes_per_s.value == pytest.approx(MEMORY, rel=0.02)
    for name, value in TRUE.items():
        # The small models' weights weigh a little after all: 50 kB per layer at 10 GB/s are 5 us.
        allowed = 30e-6 if name == "miss_s" else 8e-6  # what the missing tokens do not hide counts as miss_s, too
        assert getattr(found.overheads, name).value == pytest.approx(value, abs=allowed), name
    for stream, (share, loss) in zip(found.streaming, STREAMING, strict=True):
        assert stream.read_share.value == pytest.approx(share, abs=0.02)
        assert stream.overlap_loss.value == pytest.approx(loss, abs=0.15)  # some of it counts as miss_s
    storage = found.storage
    assert [storage.low.value, storage.typical.value, storage.high.value] == [DRIVE / 2, DRIVE, 1.5 * DRIVE]


def test_a_forecast_with_the_profile_gives_the_measured_time() -> None:
    """The circle closes: what was calibrated on two cache sizes predicts a third one."""
    device = calibrated(HOST, RATES, runs(), figure)
    wanted = decoded(LARGE, [4, 0, 2, 1])
    costs = device_costs(wanted.sizes, device)
    times = layer_times(costs, LARGE.top_k, np.array([4.0, 0, 2, 1]))
    assert 1000 * (costs.token_s + times.total_s.sum()) == pytest.approx(wanted.records[0].total_ms, rel=0.02)


def test_a_machine_too_busy_to_be_measured_is_told_so() -> None:
    found = runs()
    quick = dataclasses.replace(found["few"].records[0], dense_ms=0.01, expert_ms=0.01)
    found["large"] = Decoded(found["large"].sizes, [quick])
    with pytest.raises(EdgeError, match="no longer than the small ones: run it again"):
        calibrated(HOST, RATES, found, figure)


def test_a_profile_survives_its_file() -> None:
    device = calibrated(HOST, RATES, runs(), lambda value, how: Figure(value, "measured", f'by "{how}" µs'))
    assert parse_device(to_toml(device, "two\nlines"), "x.toml") == device
    for name in ("orin-nx-16gb", "agx-orin"):
        assert parse_device(to_toml(load_device(name), ""), "x.toml") == load_device(name)


SMALL = dataclasses.replace(LARGE, hidden_size=128, expert_size=512, shared_size=128, layers=2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("medium", "large"):
        monkeypatch.setitem(calibrate._MODELS, name, SMALL)
    monkeypatch.setattr(calibration, "_TOKENS", dict.fromkeys(calibration._TOKENS, 8))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_models_run_and_miss_as_meant(tmp_path: Path) -> None:
    models: Models = calibrate.build_models(tmp_path, lambda _: None)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.bundle" for name in calibrate._MODELS}
    found = measure_engine(models, 1, lambda _: None)
    assert found.keys() == runs().keys()
    for name in ("few", "many", "large"):
        assert found[name].per_layer("dense_ms") > 0
    for name in (name for name in found if "missing" in name):
        assert sum(sum(record.misses) for record in found[name].records) > 0, name


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(calibrate, "measure_engine", lambda *_: runs())  # real times would hang on what else runs
    out = tmp_path / "here.toml"
    assert main(["calibrate", str(tmp_path), "--out", str(out), "--seconds", "0.005", "--name", "bench"]) == 0
    text, talk = out.read_text(), capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["here.toml"]  # the scratch models are gone
    assert "fixed costs" in talk and "--device" in talk
    device = load_device(str(out))
    assert device.name == "bench" and len(device.reads) == 16
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
