"""Device profiles: what is known of a board, each number with its mark and its source.

A profile is a TOML file, `profiles/devices/NAME.toml` or a path. A figure that is not known is left out, never guessed
without saying so: mark "assumed" is a guess that says so.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from runtime import strict
from runtime.errors import BundleError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Mark = Literal["doc", "field", "measured", "assumed"]  # the vendor's word, somebody's measurement, yours, nobody's
_MAX_FILE_BYTES = 1 << 18


@dataclass(frozen=True)
class Figure:
    """A number, how far it can be trusted, and where it is from."""

    value: float
    mark: Mark
    source: str


@dataclass(frozen=True)
class Storage:
    """Read rates of the drive, bytes/s: what a forecast is told with."""

    low: Figure
    typical: Figure
    high: Figure


@dataclass(frozen=True)
class ReadRate:
    """How fast the drive reads blocks of one size with `depth` of them asked for at once, in random order."""

    block_bytes: int
    depth: int
    bytes_per_s: Figure


@dataclass(frozen=True)
class Overheads:
    """What work costs on top of moving its bytes, seconds."""

    token_s: Figure  # once per token: embedding, sampling, its record
    block_s: Figure  # per dense block
    routing_s: Figure  # per layer with experts: gates, top-k, asking the cache, putting outputs together
    expert_s: Figure  # per expert computed


@dataclass(frozen=True)
class Streaming:
    """What reading costs beside computing, with blobs of one size. Reads take the processor, too: threads wake up, the
    kernel is asked, bytes are checked. What that takes, in seconds, is missing to the arithmetic.
    """

    blob_bytes: int
    read_share: Figure  # of the drive's raw rate, what reads through the engine reach
    reading_s: Figure  # per layer that misses anything, however much
    miss_s: Figure  # per missed expert


STREAMING = ("read_share", "reading_s", "miss_s")


@dataclass(frozen=True)
class Mode:
    """A power mode by the name that nvpmodel gives it; None is not known."""

    name: str
    id: Figure | None = None
    gpu_mhz: Figure | None = None
    gpu_sms: Figure | None = None
    cpu_cores: Figure | None = None
    cpu_mhz: Figure | None = None


@dataclass(frozen=True)
class Device:
    """A board, or the host that `edge calibrate` has measured: then it has `reads` and `overheads`.

    `system_bytes` is what a headless system keeps of `ram_bytes`, which is what Linux sees.
    """

    name: str
    title: str
    ram_bytes: Figure
    system_bytes: Figure
    memory_read_bytes_per_s: Figure
    storage: Storage
    compute_capability: str | None = None
    default_mode: str | None = None
    cuda_context_bytes: Figure | None = None
    memory_nominal_bytes_per_s: Figure | None = None
    reads: tuple[ReadRate, ...] = ()
    overheads: Overheads | None = None
    streaming: tuple[Streaming, ...] = ()
    modes: tuple[Mode, ...] = ()

    def mode(self, name: str | None = None) -> Mode:
        """A mode by name, or the default one. Raises UsageError with the known names."""
        wanted = name or self.default_mode
        if not self.modes:
            raise UsageError(f"{self.name} has no power modes")
        for mode in self.modes:
            if mode.name == wanted:
                return mode
        raise UsageError(f"{self.name} has no power mode {wanted!r} (known: {', '.join(m.name for m in self.modes)})")


def device_names() -> list[str]:
    """Profiles that come with the package."""
    folder = resources.files("profiles") / "devices"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_device(name: str) -> Device:
    """A profile by name, or by the path of a .toml file. Raises UsageError naming the file and the field."""
    if name in device_names():
        text = (resources.files("profiles") / "devices" / f"{name}.toml").read_text(encoding="utf-8")
        return parse_device(text, f"{name}.toml")
    path = Path(name)
    if path.suffix != ".toml":
        raise UsageError(f"unknown device {name!r} (known: {', '.join(device_names())}; or the path of a .toml file)")
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size} bytes are no device profile")
        return parse_device(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text") from None


def parse_device(text: str, where: str) -> Device:
    """A profile from TOML text; keys and types must match exactly. Raises UsageError naming `where` and the field."""
    try:
        device = strict.from_dict(Device, tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where}: not valid TOML: {error}") from None
    except BundleError as error:
        raise UsageError(str(error)) from None
    _check_figures(device, where)
    names = [mode.name for mode in device.modes]
    if len(set(names)) != len(names):
        raise UsageError(f"{where}: two power modes have the same name")
    if device.modes or device.default_mode:
        device.mode()
    settings = [(rate.block_bytes, rate.depth) for rate in device.reads]
    if len(set(settings)) != len(settings) or any(min(setting) < 1 for setting in settings):
        raise UsageError(f"{where}: reads must name each block_bytes and depth once, both at least 1")
    sizes = [stream.blob_bytes for stream in device.streaming]
    if len(set(sizes)) != len(sizes) or any(size < 1 for size in sizes):
        raise UsageError(f"{where}: streaming must name each blob_bytes once, at least 1")
    rates = [device.storage.low.value, device.storage.typical.value, device.storage.high.value]
    if rates != sorted(rates):
        raise UsageError(f"{where}: storage must rise from low over typical to high, found {rates}")
    return device


def _check_figures(value: Any, where: str) -> None:
    """Every figure below `value` is a number that can be, and has a source."""
    if isinstance(value, Figure):
        smallest = 0 if where.endswith((".id", ".reading_s", ".miss_s")) or ".overheads." in where else math.ulp(0.0)
        if not smallest <= value.value < 1e15:
            raise UsageError(f"{where}.value: {value.value} cannot be")
        if not value.source.strip():
            raise UsageError(f"{where}.source is empty: a number without a source is not wanted")
    elif isinstance(value, (Device, Storage, Mode, ReadRate, Overheads, Streaming)):
        for field in fields(value):
            _check_figures(getattr(value, field.name), f"{where}.{field.name}")
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            _check_figures(item, f"{where}[{number}]")
