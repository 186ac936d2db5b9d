"""Forecasts: every figure of Qwen1.5-MoE-like sizes on a round-numbered board, worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edge.cli import main
from edge.inspect import model_figures
from export.families import read_model
from profiles.costs import device_costs, read_rate
from profiles.device import Device, Figure, Overheads, ReadRate, Storage, Streaming, load_device
from profiles.forecast import estimate, fit, forecast, hit_rate, point
from profiles.sizes import Sizes, model_sizes
from runtime.config import ModelConfig
from runtime.errors import UsageError
from runtime.memory import OVERHEAD_BYTES
from tests.published_configs import DEEPSEEK_V2_LITE

# 10 layers of 8 experts, 2 per token: an expert is 10 MB, shared experts 20 MB, dense 30 MB per layer, head 100 MB.
SIZES = Sizes(
    resident_bytes=1_000_000_000, kv_bytes=200_000_000, head_bytes=100_000_000, dense_layer_bytes=30_000_000,
    shared_bytes=20_000_000, expert_bytes=10_000_000, blob_bytes=10_000_000, blocks=10, layers=10, experts=8, top_k=2,
)  # fmt: skip


def test_hit_rate() -> None:
    assert hit_rate(SIZES, 8, 0.0) == 1.0
    assert hit_rate(SIZES, 2, 0.25) == 0.25  # only what the token before had
    assert hit_rate(SIZES, 5, 0.25) == 0.25 + 0.75 * 0.5  # half of the six others are there, too
    for slots in range(2, 9):  # chance, 2 of 8, must give the plain share of the experts that are resident
        assert hit_rate(SIZES, slots, 0.25) == pytest.approx(slots / 8)


def device(drive_bytes_per_s: float, memory_bytes_per_s: float = 10e9, **more: object) -> Device:
    drive, memory = (Figure(value, "assumed", "a test") for value in (drive_bytes_per_s, memory_bytes_per_s))
    board = load_device("orin-nx-16gb")
    return dataclasses.replace(board, storage=Storage(drive, drive, drive), memory_read_bytes_per_s=memory, **more)  # type: ignore[arg-type]


def test_a_token_that_waits_for_the_drive() -> None:
    found = estimate(SIZES, device(1e9), slots=2, overlap=0.5)
    # Per layer: 30 MB dense = 3 ms; one miss of 10 MB = 10 ms, while shared 2 ms and one hit 1 ms are computed; the
    # missed expert 1 ms. Head 10 ms.
    assert found.tpot_ms == pytest.approx(10 + 10 * (3 + 10 + 1))
    assert found.drive_ms == pytest.approx(10 * (10 - 3))
    assert (found.misses_per_token, found.read_bytes_per_token, found.limit) == (10, 100_000_000, "memory bandwidth")
    slow = estimate(SIZES, device(0.5e9), slots=2, overlap=0.5)
    assert slow.tpot_ms == pytest.approx(10 + 10 * (3 + 20 + 1))
    assert slow.limit == "the drive"


def test_a_token_that_waits_for_memory() -> None:
    found = estimate(SIZES, device(1e9), slots=8, overlap=0.25)
    assert found.tpot_ms == pytest.approx(10 + 10 * (3 + 2 + 2))
    assert (found.drive_ms, found.misses_per_token, found.limit) == (0, 0, "memory bandwidth")


def test_missed_experts_are_arithmetic_too_when_the_drive_is_fast() -> None:
    """Both experts missed, 1 ms to read: shared 2 ms, then two experts of 1 ms each; the drive is not waited for."""
    found = point(SIZES, device(20e9), np.full((4, 10), 2.0))
    assert found.tpot_ms == pytest.approx(10 + 10 * (3 + 2 + 2))
    assert (found.drive_ms, found.hit_rate) == (0, 0)


def test_tokens_of_a_trace_are_averaged_layer_by_layer() -> None:
    """A layer with two misses waits 20 - 3 ms where two layers with one each wait 10 - 3: means would not tell."""
    uneven, even = np.array([[2.0, 0.0] * 5]), np.ones((1, 10))
    board = device(1e9)
    assert point(SIZES, board, even).tpot_ms == pytest.approx(10 + 10 * (3 + 10 + 1))
    # Two misses: 3 + 20 + 1 (shared 2 and one expert are computed meanwhile); none: 3 + 2 + 2.
    assert point(SIZES, board, uneven).tpot_ms == pytest.approx(10 + 5 * 24 + 5 * 7)


def test_overheads_add_up() -> None:
    seconds = {"token_s": 0.007, "block_s": 0.0005, "routing_s": 0.0003, "expert_s": 0.0002}
    overheads = Overheads(**{name: Figure(value, "assumed", "a test") for name, value in seconds.items()})
    found = point(dataclasses.replace(SIZES, blocks=20), device(1e9, overheads=overheads), np.ones((1, 10)))
    # Two blocks per layer with experts. Read 10 ms; beside it shared 2.2 and one hit 1.2; then the missed expert, 1.2.
    assert found.tpot_ms == pytest.approx(10 + 7 + 10 * (3 + 2 * 0.5 + 0.3 + 10 + 1.2))
    assert found.drive_ms == pytest.approx(10 * (10 - 3.4))


def handling(share: float, reading_s: float, miss_s: float, blob_bytes: int = 10_000_000) -> Streaming:
    return Streaming(blob_bytes, *(Figure(value, "assumed", "a test") for value in (share, reading_s, miss_s)))


def test_handling_of_reads_counts_where_the_drive_is_not_waited_for() -> None:
    streaming = (handling(0.8, 0.0008, 0.0002),)
    hidden = point(SIZES, device(1e9, streaming=streaming), np.ones((1, 10)))
    assert hidden.tpot_ms == pytest.approx(10 + 10 * (3 + 10 / 0.8 + 1))  # beside: 2 + 1 + 0.8 + 0.2, within 12.5
    seen = point(SIZES, device(20e9, streaming=streaming), np.full((1, 10), 2.0))
    assert seen.tpot_ms == pytest.approx(10 + 10 * (3 + 2 + 2 + 0.8 + 2 * 0.2))  # reads of 1.25 ms beside 3 and more
    none = point(SIZES, device(20e9, streaming=streaming), np.zeros((1, 10)))
    assert none.tpot_ms == pytest.approx(10 + 10 * (3 + 2 + 2))
    half = point(SIZES, device(20e9, streaming=streaming), np.full((1, 10), 0.5))  # every other layer misses one
    assert half.tpot_ms == pytest.approx(10 + 10 * (3 + 2 + 2 + 0.4 + 0.1))


def test_handling_between_the_measured_sizes() -> None:
    """By the logarithm of the size: 10 MB lie half way from 5 to 20 MB; beyond them it is the nearest one's."""
    streaming = (handling(0.6, 0.002, 0.0004, 5_000_000), handling(0.8, 0.004, 0.0002, 20_000_000))
    costs = device_costs(SIZES, device(1e9, streaming=streaming))
    assert (costs.reading_s, costs.miss_s) == pytest.approx((0.003, 0.0003))
    assert costs.read_s(np.array([1.0])) == pytest.approx([0.01 / 0.7])
    costs = device_costs(dataclasses.replace(SIZES, blob_bytes=1_000_000), device(1e9, streaming=streaming))
    assert (costs.reading_s, costs.miss_s) == (0.002, 0.0004)
    bare = device_costs(SIZES, device(1e9))
    assert (bare.reading_s, bare.miss_s) == (0, 0)  # nobody has measured it: a floor


def test_read_rates_between_the_measured_points() -> None:
    points = ((1 << 20, 1, 1e9), (1 << 20, 4, 4e9), (1 << 22, 1, 4e9), (1 << 22, 4, 4e9))
    reads = tuple(ReadRate(block, depth, Figure(rate, "measured", "a test")) for block, depth, rate in points)
    for block, depth, rate in (*points, (1 << 20, 2, 2e9), (1 << 21, 1, 2e9), (1 << 10, 1, 1e9), (1 << 30, 64, 4e9)):
        assert read_rate(reads, block, depth) == pytest.approx(rate)
    # One blob of 10 MB goes in 8 chunks of 1.25 MB to 8 threads, so it is read at the deepest rate measured.
    board = device(1.0, reads=reads)
    rate = read_rate(reads, 1.25e6, 8)
    assert device_costs(SIZES, board).read_s(np.array([1.0, 2.0])) == pytest.approx([10e6 / rate, 20e6 / rate])


def test_memory_sum() -> None:
    board = load_device("orin-nx-16gb")
    board = dataclasses.replace(board, ram_bytes=Figure(4_000_000_000, "assumed", "a test"))
    usable = 4_000_000_000 - 900_000_000 - 300_000_000 - OVERHEAD_BYTES  # 2.5 GB
    found = fit(SIZES, board)
    assert (found.usable_bytes, found.expert_bytes) == (usable, usable - 1_200_000_000)
    assert (found.slots, found.runs) == (8, True)  # 13 would fit, there are 8
    small = dataclasses.replace(board, ram_bytes=Figure(2_850_000_000, "assumed", "a test"))
    assert (fit(SIZES, small).slots, fit(SIZES, small).runs) == (
        1,
        False,
    )  # 150 MB hold one per layer, a token needs two


@pytest.fixture(scope="module")
def lite() -> ModelConfig:
    return read_model(dict(DEEPSEEK_V2_LITE), {})


def test_sizes_agree_with_inspect(lite: ModelConfig) -> None:
    sizes, figures = model_sizes(lite, 4096), model_figures(lite)
    assert sizes.blob_bytes == figures["blob_bytes"] == 3 * 2048 * 1408 * 2
    assert sizes.resident_bytes == figures["dense_bytes"] + figures["router_bytes"]
    assert sizes.kv_bytes == 4096 * figures["kv_bytes_per_token"]
    assert (sizes.layers, sizes.experts, sizes.top_k) == (26, 64, 6)
    assert sizes.shared_bytes == 2 * 3 * 2048 * 1408 * 2  # two shared experts


def test_worst_and_best_are_on_both_sides(lite: ModelConfig) -> None:
    found = forecast(lite, load_device("orin-nx-16gb"))
    assert found.fit.slots == 27 and found.usual and found.best and found.worst
    assert found.best.tpot_ms < found.usual.tpot_ms < found.worst.tpot_ms
    assert found.worst.overlap == pytest.approx(6 / 64) and found.best.overlap == pytest.approx(0.273)
    times = [result.tpot_ms for _, result in found.helps]
    assert times == sorted(times) and times[-1] < found.usual.tpot_ms
    measured = forecast(lite, load_device("orin-nx-16gb"), overlap=0.345)
    assert measured.usual and measured.usual.overlap == measured.usual.overlap == 0.345


def test_a_faster_drive_never_makes_a_token_slower(lite: ModelConfig) -> None:
    board = load_device("orin-nx-8gb")
    times = []
    for rate in (1e9, 2e9, 4e9, 8e9, 1e12):
        figure = Figure(rate, "assumed", "a test")
        found = forecast(lite, dataclasses.replace(board, storage=Storage(figure, figure, figure)))
        assert found.usual
        times.append(found.usual.tpot_ms)
    assert times == sorted(times, reverse=True)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(DEEPSEEK_V2_LITE))
    assert main(["forecast", str(config), "--device", "orin-nx-16gb"]) == 0
    out, err = capsys.readouterr()
    assert "fits                yes, 27 slots per layer" in out and "limited by          the drive" in out
    assert re_words(out, "drive, usual") == ["3.50e9", "assumed"]
    assert "not yet run on a board" in err
    assert main(["forecast", str(config), "--device", "orin-nx-8gb", "--json", "--overlap", "0.3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fit"]["runs"] is True and found["usual"]["overlap"] == 0.3
    assert found["assumptions"]["system"]["mark"] == "assumed"
    board = tmp_path / "small.toml"
    text = (Path(__file__).resolve().parents[2] / "profiles/devices/orin-nx-8gb.toml").read_text()
    board.write_text(text.replace("value = 7600000000", "value = 6000000000"))
    assert main(["forecast", str(config), "--device", str(board)]) == 0
    assert "fits                no: 3 slots per layer are fewer than a token needs" in capsys.readouterr().out


def re_words(text: str, row: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.strip().startswith(row))
    return line.strip().removeprefix(row).split()[:2]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], lite: ModelConfig) -> None:
    assert main(["forecast", str(tmp_path / "none"), "--device", "agx-orin"]) == 2
    assert "none: no such bundle, checkpoint or config.json" in capsys.readouterr().err
    board = load_device("agx-orin")
    with pytest.raises(UsageError, match=r"--overlap 1.5: a share"):
        forecast(lite, board, overlap=1.5)
    with pytest.raises(UsageError, match=r"--context 999999999: this model allows"):
        forecast(lite, board, context=999_999_999)
