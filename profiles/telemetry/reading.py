"""One look at a machine, whoever took it. What a source does not tell is None, or missing from a mapping; never zero.

Memory in MiB, clocks in MHz, loads in percent, temperatures in degrees Celsius, power in milliwatts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Power:
    """A rail in mW. `average` is the tool's own mean since it was started: shown, never used in a sum."""

    current: float
    average: float | None = None
    peak: float | None = None


@dataclass(frozen=True)
class Unit:
    """A fixed-function engine: `on` is False when it is switched off; `mhz` is empty where no clock is told."""

    on: bool
    percent: int | None = None
    mhz: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reading:
    """Lists have one entry per core, None for a core that is off; `time` is the wall clock of the line, ISO 8601."""

    time: str | None = None
    ram_used_mib: float | None = None
    ram_total_mib: float | None = None
    swap_used_mib: float | None = None
    cpu_percent: tuple[float | None, ...] = ()
    cpu_mhz: tuple[int | None, ...] = ()
    emc_percent: int | None = None
    emc_mhz: int | None = None
    gr3d_percent: float | None = None
    gr3d_mhz: tuple[int, ...] = ()
    temperatures_c: Mapping[str, float | None] = field(default_factory=dict)  # None: the sensor cannot be read
    power_mw: Mapping[str, Power] = field(default_factory=dict)
    engines: Mapping[str, Unit] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object that `edge tegrastats --json` prints; `unknown` is there only when there is something in it."""
        found = asdict(self)
        if not self.unknown:
            del found["unknown"]
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Reading:
        """The inverse of `to_json`."""
        lists = {name: tuple(found[name]) for name in ("cpu_percent", "cpu_mhz", "gr3d_mhz")}
        power = {rail: Power(**values) for rail, values in found["power_mw"].items()}
        engines = {n: Unit(e["on"], e["percent"], tuple(e["mhz"])) for n, e in found["engines"].items()}
        return cls(**{**found, **lists, "power_mw": power, "engines": engines})
