"""Any Linux machine as a source: psutil, and RAPL energy counters where they may be read."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from profiles.telemetry.reading import Power, Reading
from profiles.telemetry.source import PolledSource

_MIB = 1 << 20


class Rapl:
    """Power of the processor packages from their energy counters (microjoules that wrap around)."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._zones: dict[str, Path] = {}
        self.unreadable = 0
        for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
            try:
                name = (zone / "name").read_text().strip()
                int((zone / "energy_uj").read_text())
            except (OSError, ValueError):
                self.unreadable += 1  # only root may read it on most kernels
                continue
            if name.startswith("package"):  # core, uncore and dram zones are parts of it or of other sums
                self._zones[name] = zone
        self._last: dict[str, tuple[int, int]] = {}

    def read(self, now_ns: int) -> dict[str, Power]:
        """Mean milliwatts by package since the call before; empty at the first one."""
        found = {}
        for name, zone in self._zones.items():
            energy = int((zone / "energy_uj").read_text())
            if name in self._last:
                before, before_ns = self._last[name]
                used = energy - before
                if used < 0:
                    used += int((zone / "max_energy_range_uj").read_text())
                found[name] = Power(current=used * 1e6 / (now_ns - before_ns))  # uJ / ns = 1e6 mW
            self._last[name] = (energy, now_ns)
        return found


def host_source(interval_s: float, root: Path = Path("/")) -> PolledSource:
    """This machine, board or not."""
    rapl = Rapl(root)
    psutil.cpu_percent(percpu=True)  # loads are told since the call before
    return PolledSource("host", lambda: read_host(rapl), interval_s)


def read_host(rapl: Rapl) -> Reading:
    """The present state of the machine."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    sensors = psutil.sensors_temperatures()
    clocks = psutil.cpu_freq(percpu=True) or []
    return Reading(
        ram_used_mib=round((memory.total - memory.available) / _MIB, 1),
        ram_total_mib=round(memory.total / _MIB, 1),
        swap_used_mib=round(swap.used / _MIB, 1),
        cpu_percent=tuple(psutil.cpu_percent(percpu=True)),
        cpu_mhz=tuple(int(clock.current) for clock in clocks),
        temperatures_c={f"{s.label or chip}": s.current for chip, rows in sensors.items() for s in rows},
        power_mw=rapl.read(time.monotonic_ns()),
    )
