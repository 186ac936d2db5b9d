"""jetson-stats (jtop) as a source. Optional: it is imported only when it is asked for, or when `auto` looks for it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from profiles.telemetry.reading import Power, Reading
from profiles.telemetry.source import PolledSource, Sink, TelemetryError


class JtopSource(PolledSource):
    """The service of jtop, asked every `interval_s` seconds."""

    def __init__(self, interval_s: float) -> None:
        super().__init__("jtop", self._ask, interval_s)
        self._client: Any = None

    def start(self, sink: Sink) -> None:
        """Raises TelemetryError when jetson-stats is not installed or its service does not answer."""
        try:
            module = importlib.import_module("jtop")
        except ImportError:
            raise TelemetryError("jtop: not installed: pip install jetson-stats (AGPL-3.0) on the board") from None
        try:
            self._client = module.jtop(interval=self._interval_s)
            self._client.start()
        except module.JtopException as error:
            self._client = None
            raise TelemetryError(
                f"jtop: {' '.join(str(error).split())}: run `sudo systemctl restart jtop.service`"
            ) from None
        try:
            super().start(sink)
        except TelemetryError:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _ask(self) -> Reading:
        if not self._client.ok():
            raise TelemetryError("its service went away")
        return read_jtop(self._client)


def read_jtop(client: Any) -> Reading:
    """What a started client holds: memory in KB, clocks in kHz, power in mW."""
    ram, swap = client.memory["RAM"], client.memory.get("SWAP", {})
    cores = client.cpu["cpu"]
    gpu: Mapping[str, Any] = next(iter(client.gpu.values()), {})
    emc: Mapping[str, Any] = client.memory.get("EMC", {})
    zones = client.temperature.items()
    return Reading(
        ram_used_mib=ram["used"] / 1024,
        ram_total_mib=ram["tot"] / 1024,
        swap_used_mib=swap["used"] / 1024 if "used" in swap else None,
        cpu_percent=tuple(round(100 - core["idle"], 1) if core.get("online") else None for core in cores),
        cpu_mhz=tuple(_mhz(core.get("freq", {}).get("cur")) if core.get("online") else None for core in cores),
        emc_percent=emc.get("val"),
        emc_mhz=_mhz(emc.get("cur")),
        gr3d_percent=gpu.get("status", {}).get("load"),
        gr3d_mhz=() if (clock := _mhz(gpu.get("freq", {}).get("cur"))) is None else (clock,),
        temperatures_c={name: zone["temp"] if zone.get("online", True) else None for name, zone in zones},
        power_mw={name: Power(rail["power"], rail.get("avg")) for name, rail in client.power["rail"].items()},
    )


def _mhz(khz: float | None) -> int | None:
    return None if khz is None else int(khz // 1000)
