"""Kernel files as a source, for a board without tegrastats: INA3221 power, devfreq, thermal zones, /proc.

Every path hangs below `root`, so that a test can build a board out of files. What is not there is left out.
"""

from __future__ import annotations

from pathlib import Path

from profiles.telemetry.reading import Power, Reading
from profiles.telemetry.source import PolledSource, TelemetryError

_CHANNELS = range(1, 9)


class BoardFiles:
    """Reads one board; keeps the counters of /proc/stat, since a load is a difference."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._times = self._cpu_times()

    def check(self) -> None:
        """Raises TelemetryError where there is neither an INA3221 with rails nor a Jetson GPU."""
        if not self._power() and self._gpu_load() is None:
            where = self._root / "sys/bus/i2c/drivers/ina3221"
            raise TelemetryError(f"sysfs: no readable power rail in {where} and no Jetson GPU: try --telemetry host")

    def read(self) -> Reading:
        """The present state. Raises OSError where not even /proc/meminfo can be read."""
        memory = _meminfo(self._root / "proc/meminfo")
        load, clock = self._gpu_load(), self._gpu_mhz()
        return Reading(
            ram_used_mib=(memory["MemTotal"] - memory["MemAvailable"]) / 1024,
            ram_total_mib=memory["MemTotal"] / 1024,
            swap_used_mib=(memory["SwapTotal"] - memory["SwapFree"]) / 1024 if "SwapTotal" in memory else None,
            cpu_percent=self._cpu_percent(),
            cpu_mhz=self._cpu_mhz(),
            gr3d_percent=load,
            gr3d_mhz=() if clock is None else (clock,),
            temperatures_c=self._temperatures(),
            power_mw={rail: Power(current=value) for rail, value in self._power().items()},
        )

    def _power(self) -> dict[str, float]:
        """Milliwatts by rail: the INA3221 gives millivolts and milliamperes per channel."""
        found: dict[str, float] = {}
        for sensor in sorted((self._root / "sys/bus/i2c/drivers/ina3221").glob("*/hwmon/hwmon*")):
            for channel in _CHANNELS:
                label = _text(sensor / f"in{channel}_label")
                volts, amperes = _integer(sensor / f"in{channel}_input"), _integer(sensor / f"curr{channel}_input")
                if label and not label.startswith("NC") and volts is not None and amperes is not None:
                    found[label] = volts * amperes / 1000
        return found

    def _gpu_load(self) -> float | None:
        for name in ("gpu.0", "17000000.gpu", "bus@0/17000000.gpu"):
            load = _integer(self._root / "sys/devices/platform" / name / "load")
            if load is not None:
                return load / 10  # per mille
        return None

    def _gpu_mhz(self) -> int | None:
        for folder in sorted((self._root / "sys/class/devfreq").glob("*gpu*")):
            hertz = _integer(folder / "cur_freq")
            if hertz is not None:
                return hertz // 1_000_000
        return None

    def _temperatures(self) -> dict[str, float | None]:
        """By zone; a zone that is off answers with an error or -256000."""
        found: dict[str, float | None] = {}
        for zone in sorted((self._root / "sys/class/thermal").glob("thermal_zone*")):
            name, milli = _text(zone / "type"), _integer(zone / "temp")
            if name:
                found[name.removesuffix("-thermal")] = None if milli in (None, -256000) else milli / 1000
        return found

    def _cpu_mhz(self) -> tuple[int | None, ...]:
        clocks = []
        for number in self._times:
            khz = _integer(self._root / f"sys/devices/system/cpu/cpu{number}/cpufreq/scaling_cur_freq")
            clocks.append(None if khz is None else khz // 1000)
        return tuple(clocks)

    def _cpu_percent(self) -> tuple[float | None, ...]:
        """Load of each core since the last reading."""
        before, self._times = self._times, self._cpu_times()
        loads = []
        for number, (idle, total) in self._times.items():
            idle_before, total_before = before.get(number, (0, 0))
            spent = total - total_before
            loads.append(None if spent <= 0 else round(100 * (1 - (idle - idle_before) / spent), 1))
        return tuple(loads)

    def _cpu_times(self) -> dict[int, tuple[int, int]]:
        """(idle, all) ticks of every core that is on."""
        found = {}
        for line in (_text(self._root / "proc/stat") or "").splitlines():
            name, *ticks = line.split()
            if name.startswith("cpu") and name[3:].isdigit():
                times = [int(tick) for tick in ticks[:8]]  # guest time is part of user time
                found[int(name[3:])] = (times[3] + times[4], sum(times))
        return found


def clock_limits(root: Path = Path("/")) -> dict[str, dict[str, int] | None]:
    """{"cpu", "gpu"}: lowest and highest MHz that the governor may choose; None where it is not told.

    Equal limits are what jetson_clocks leaves behind: the clock is fixed.
    """
    cpus = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
    gpus = sorted((root / "sys/class/devfreq").glob("*gpu*"))
    return {
        "cpu": _limits(cpus, "scaling_min_freq", "scaling_max_freq", 1000),
        "gpu": _limits(gpus, "min_freq", "max_freq", 1_000_000),
    }


def _limits(folders: list[Path], low: str, high: str, per_mhz: int) -> dict[str, int] | None:
    lows, highs = ([_integer(folder / name) for folder in folders] for name in (low, high))
    known_lows, known_highs = ([value for value in values if value is not None] for values in (lows, highs))
    if not known_lows or not known_highs:
        return None
    return {"min_mhz": min(known_lows) // per_mhz, "max_mhz": max(known_highs) // per_mhz}


def sysfs_source(interval_s: float, root: Path = Path("/")) -> PolledSource:
    """The board's files. Raises TelemetryError when this is no board."""
    board = BoardFiles(root)
    board.check()
    return PolledSource("sysfs", board.read, interval_s)


def _meminfo(path: Path) -> dict[str, int]:
    """KiB by name."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) > 1}


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None  # not there, not ours to read, or switched off: told by its absence


def _integer(path: Path) -> int | None:
    text = _text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None
