"""Telemetry sources: a fake tegrastats in every mood, fake boards made of files, a fake jtop."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from profiles.telemetry import source as source_module
from profiles.telemetry.files import BoardFiles, clock_limits, sysfs_source
from profiles.telemetry.host import Rapl, host_source
from profiles.telemetry.jtop import JtopSource
from profiles.telemetry.reading import Power, Reading
from profiles.telemetry.source import PolledSource, Sample, TelemetryError
from profiles.telemetry.sources import start_source
from profiles.telemetry.tegrastats import TegrastatsSource
from runtime.errors import UsageError
from tests.unit.fake_tegrastats import FakeTegrastats


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTegrastats]:
    """Whatever a test does, nothing may be left running after it."""
    fake = FakeTegrastats(tmp_path, monkeypatch)
    threads = threading.active_count()
    yield fake
    wait_for(lambda: fake.running() == [], 5.0)  # a killed process group is gone a moment after the signal
    assert threading.active_count() == threads


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def collect(source: TegrastatsSource, samples: list[Sample], count: int) -> None:
    source.start(samples.append)
    wait_for(lambda: len(samples) >= count)
    source.close()


@pytest.mark.parametrize("mode", ["steady", "stubborn", "leaves a child", "mixed"])
def test_samples_come_and_it_ends_when_told(mode: str, fake: FakeTegrastats) -> None:
    fake.install(mode)
    samples: list[Sample] = []
    source = TegrastatsSource(0.2, terminate_s=0.3)
    before = time.monotonic_ns()
    collect(source, samples, 5)
    assert [s.reading.ram_used_mib for s in samples[:5]] == [1, 2, 3, 4, 5]
    assert samples[0].reading.power_mw == {"VDD_IN": Power(5000, 1)}
    times = [s.time_ns for s in samples]
    assert before < times[0] and times == sorted(times) and times[-1] < time.monotonic_ns()
    assert fake.started == 1
    problems = source.problems
    if mode == "mixed":
        assert "lines could not be read, the first: RAM: found 'lots'" in problems[0]
    assert len(problems) == (mode == "mixed")
    source.close()  # twice is safe


def test_death_on_the_way_is_told_with_code_and_last_words(fake: FakeTegrastats) -> None:
    fake.install("dies")
    samples: list[Sample] = []
    source = TegrastatsSource(0.2)
    source.start(samples.append)
    wait_for(lambda: source.problems != [])
    source.close()
    assert len(samples) == 2
    (problem,) = source.problems
    assert problem.startswith("tegrastats: ended by itself after ")
    assert problem.endswith("s (exit code 3), saying 'sensor lost'; there is no telemetry after it")


@pytest.mark.parametrize("mode", ["hangs", "pauses"])
def test_silence_is_told(mode: str, fake: FakeTegrastats) -> None:
    fake.install(mode)
    samples: list[Sample] = []
    source = TegrastatsSource(0.02)
    source.start(samples.append)
    if mode == "hangs":
        time.sleep(1.1)
    else:
        wait_for(lambda: len(samples) >= 3)
    source.close()
    (problem,) = source.problems
    assert "tegrastats: no line for up to 1." in problem
    assert "(1 gaps)" in problem


def test_a_line_without_an_end_fills_no_memory(fake: FakeTegrastats) -> None:
    fake.install("endless")
    source = TegrastatsSource(0.2)
    source.start(lambda sample: None)
    wait_for(lambda: source.problems != [])
    source.close()
    assert "no field of tegrastats in" in source.problems[0]
    assert len(source.problems[0]) < 300


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("refuses", r"after .* s \(exit code 1\), saying 'needs root': run `.*/tegrastats --interval 200`"),
        ("silent", "no line that can be read in 0.3 s: run"),
        ("garbage", r"in 0.3 s \(instead: no field of tegrastats in 'Segmentation fnord'\)"),
    ],
)  # fmt: skip
def test_a_source_that_does_not_start_is_one_error_and_no_process(
    mode: str, message: str, fake: FakeTegrastats
) -> None:
    fake.install(mode)
    with pytest.raises(TelemetryError, match=message):
        TegrastatsSource(0.2, first_line_s=0.3).start(lambda sample: None)
    assert fake.started == 1


def test_no_tegrastats_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(TelemetryError, match="no such program on PATH: it comes with JetPack; try --telemetry host"):
        TegrastatsSource(0.2).start(lambda sample: None)


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """A board of files: one INA3221 with two rails and an unused channel, GPU, two cores, two thermal zones."""
    root = tmp_path / "board"
    sensor = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    files = {
        f"{sensor}/in1_label": "VDD_IN",
        f"{sensor}/in1_input": "5000",
        f"{sensor}/curr1_input": "1200",
        f"{sensor}/in2_label": "VDD_SOC",
        f"{sensor}/in2_input": "5000",
        f"{sensor}/curr2_input": "300",
        f"{sensor}/in3_label": "NC",
        f"{sensor}/in3_input": "0",
        f"{sensor}/curr3_input": "0",
        f"{sensor}/in7_label": "sum of shunt voltages",
        f"{sensor}/in7_input": "99",
        "sys/devices/platform/gpu.0/load": "345",
        "sys/class/devfreq/17000000.gpu/cur_freq": "918000000",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
        "sys/class/thermal/thermal_zone0/temp": "51250",
        "sys/class/thermal/thermal_zone1/type": "cv0-thermal",
        "sys/class/thermal/thermal_zone1/temp": "-256000",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1984000",
        "proc/meminfo": "MemTotal: 16031744 kB\nMemAvailable: 12031744 kB\nSwapTotal: 2048 kB\nSwapFree: 1024 kB\n",
        "proc/stat": "cpu 9 9 9 9\ncpu0 100 0 0 900 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_board_files(board: Path) -> None:
    files = BoardFiles(board)
    # 200 ticks later on core 0, 50 of them idle; core 1 told nothing new.
    (board / "proc/stat").write_text("cpu0 250 0 0 930 20 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\n")
    reading = files.read()
    assert reading.power_mw == {"VDD_IN": Power(6000), "VDD_SOC": Power(1500)}  # 5000 mV x 1200 mA / 1000
    assert (reading.gr3d_percent, reading.gr3d_mhz) == (34.5, (918,))
    assert reading.temperatures_c == {"cpu": 51.25, "cv0": None}
    assert (reading.ram_used_mib, reading.ram_total_mib, reading.swap_used_mib) == (3906.25, 15656.0, 1.0)
    assert (reading.cpu_percent, reading.cpu_mhz) == ((75.0, None), (1984, None))


def test_clock_limits_tell_whether_jetson_clocks_has_been_run(board: Path) -> None:
    assert clock_limits(board) == {"cpu": None, "gpu": None}
    cpu, gpu = board / "sys/devices/system/cpu/cpu0/cpufreq", board / "sys/class/devfreq/17000000.gpu"
    for path, value in (
        (cpu / "scaling_min_freq", 729600), (cpu / "scaling_max_freq", 1984000),
        (gpu / "min_freq", 918000000), (gpu / "max_freq", 918000000),
    ):  # fmt: skip
        path.write_text(f"{value}\n")
    assert clock_limits(board) == {
        "cpu": {"min_mhz": 729, "max_mhz": 1984}, "gpu": {"min_mhz": 918, "max_mhz": 918},
    }  # fmt: skip


def test_a_machine_that_is_no_board_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(TelemetryError, match="sysfs: no readable power rail in .*ina3221 and no Jetson GPU"):
        sysfs_source(0.1, tmp_path)


def test_polling_goes_on_after_a_failure(board: Path) -> None:
    samples: list[Sample] = []
    source = sysfs_source(0.01, board)
    source.start(samples.append)
    (board / "proc/meminfo").rename(board / "proc/gone")
    wait_for(lambda: source.problems != [])
    (board / "proc/gone").rename(board / "proc/meminfo")
    count = len(samples)
    wait_for(lambda: len(samples) > count)
    source.close()
    count = len(samples)
    time.sleep(0.05)
    assert len(samples) == count
    assert "readings failed, the first: No such file or directory: " in source.problems[0]


def test_rapl_counts_the_difference_and_the_wrap(tmp_path: Path) -> None:
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    part = tmp_path / "sys/class/powercap/intel-rapl:0:0"
    for folder, name in ((zone, "package-0"), (part, "core")):
        folder.mkdir(parents=True)
        (folder / "name").write_text(name + "\n")
        (folder / "energy_uj").write_text("900000\n")
        (folder / "max_energy_range_uj").write_text("1000000\n")
    rapl = Rapl(tmp_path)
    assert rapl.read(0) == {}
    (zone / "energy_uj").write_text("950000\n")
    assert rapl.read(500_000_000) == {"package-0": Power(100.0)}  # 50,000 uJ in 0.5 s are 100 mW
    (zone / "energy_uj").write_text("50000\n")
    assert rapl.read(1_500_000_000) == {"package-0": Power(100.0)}  # past the wrap: 100,000 uJ in 1 s


def test_the_host_tells_memory_and_a_load_per_core() -> None:
    samples: list[Sample] = []
    source = host_source(0.01)
    source.start(samples.append)
    wait_for(lambda: len(samples) >= 3)
    source.close()
    reading = samples[-1].reading
    assert reading.ram_used_mib and reading.ram_total_mib and reading.ram_used_mib < reading.ram_total_mib
    assert len(reading.cpu_percent) >= 1
    assert source.problems == []


class FakeClient:
    """The part of jtop's client that is used, with values as its documentation shows them."""

    alive = True
    closed = 0

    def __init__(self, interval: float) -> None:
        self.memory = {
            "RAM": {"tot": 16031744, "used": 4096000},
            "SWAP": {"tot": 1, "used": 2048},
            "EMC": {"cur": 2133000, "val": 4},
        }
        self.cpu = {"cpu": [{"online": True, "idle": 75.0, "freq": {"cur": 1984000}}, {"online": False}]}
        self.gpu = {"gpu": {"status": {"load": 12.5}, "freq": {"cur": 918000}}}
        self.temperature = {"cpu": {"temp": 50.5, "online": True}, "cv0": {"temp": -256, "online": False}}
        self.power = {"rail": {"VDD_IN": {"power": 5000, "avg": 4000}}, "tot": {"power": 5000, "avg": 4000}}

    def start(self) -> None:
        if not FakeClient.alive:
            raise FakeModule.JtopException("The jtop.service is not active. Please run:\nsudo systemctl restart")

    def ok(self) -> bool:
        return True

    def close(self) -> None:
        FakeClient.closed += 1


class FakeModule(types.ModuleType):
    class JtopException(Exception):
        pass

    jtop = FakeClient


def test_jtop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jtop", FakeModule("jtop"))
    monkeypatch.setattr(FakeClient, "closed", 0)
    samples: list[Sample] = []
    source = JtopSource(0.01)
    source.start(samples.append)
    source.close()
    assert samples[0].reading == Reading(
        ram_used_mib=4000, ram_total_mib=15656, swap_used_mib=2, cpu_percent=(25.0, None), cpu_mhz=(1984, None),
        emc_percent=4, emc_mhz=2133, gr3d_percent=12.5, gr3d_mhz=(918,), temperatures_c={"cpu": 50.5, "cv0": None},
        power_mw={"VDD_IN": Power(5000, 4000)},
    )  # fmt: skip
    assert FakeClient.closed == 1


def test_jtop_that_is_not_there_or_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jtop", None)
    with pytest.raises(TelemetryError, match="jtop: not installed: pip install jetson-stats"):
        JtopSource(0.1).start(lambda sample: None)
    monkeypatch.setitem(sys.modules, "jtop", FakeModule("jtop"))
    monkeypatch.setattr(FakeClient, "alive", False)
    with pytest.raises(TelemetryError, match="^jtop: The jtop.service is not active. Please run: sudo [^\n]*$"):
        JtopSource(0.1).start(lambda sample: None)


def test_auto_takes_the_first_that_works_and_says_why(fake: FakeTegrastats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jtop", None)
    source, reason = start_source("auto", lambda sample: None, 0.05)
    assert source is not None and source.name == "host"
    assert reason == "telemetry: host (tegrastats is not there; jtop is not there; sysfs is not there)"
    source.close()
    fake.install("refuses")  # a board whose tool fails must hear of it
    source, reason = start_source("auto", lambda sample: None, 0.05)
    assert source is not None
    source.close()
    assert reason.startswith("telemetry: host (tegrastats: ended by itself") and "needs root" in reason
    fake.install("steady")
    source, reason = start_source("auto", lambda sample: None, 0.05)
    assert source is not None and reason == "telemetry: tegrastats"
    source.close()


def test_a_source_that_was_named_is_never_replaced() -> None:
    assert start_source("none", lambda sample: None) == (None, "telemetry: none, as asked for")
    with pytest.raises(UsageError, match=r"unknown telemetry 'x' \(known: auto, tegrastats, jtop, sysfs, host, none\)"):
        start_source("x", lambda sample: None)
    with pytest.raises(TelemetryError, match="no such program on PATH"):
        start_source("tegrastats", lambda sample: None)


def test_polling_keeps_its_pace_when_a_reading_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading slower than the interval once made the next ones come all at once."""
    waits: list[float] = []
    clock = [0.0]

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(round(timeout, 3))
            clock[0] += timeout
            return len(waits) == 4

    def slow() -> Reading:
        clock[0] += 0.25
        return Reading()

    monkeypatch.setattr(source_module.time, "monotonic", lambda: clock[0])
    polled = PolledSource("slow", slow, 0.1)
    polled._stop = Stop()
    polled._poll(lambda sample: None)
    assert waits == [0.1, 0.0, 0.0, 0.0]
