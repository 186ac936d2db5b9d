"""One line of tegrastats to a Reading: every form from TX2 (L4T 32) to Thor (L4T 38) that is known to us.

A line is a row of fields in no fixed order, any of which may be absent:

    07-28-2026 20:28:42                            month-day-year and time, since JetPack 5
    RAM 3941/15656MB (lfb 6x4MB)                   MB are MiB; SWAP may stand anywhere, or nowhere
    CPU [1%@1984,off]                              also [1%,off]@1984 on old boards
    EMC_FREQ 4%@2133   GR3D_FREQ 12%@[1300,1300]   any part may be missing: 0%, @318, @[305], off
    cpu@52.968C   cpu@52.968C/53.1C                current, or current/peak; -256C: cannot be read
    VDD_IN 5299mW/5299mW/5299mW                    current/average/peak, or fewer; no mW before JetPack 5
    NVDEC off   VIC 59%@423   NVENC0_FREQ @314   APE 174

What fits none of them is kept as text under its first word.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from profiles.telemetry.reading import Power, Reading, Unit
from runtime.errors import EdgeError

UNREADABLE_C = -256.0
_MIB = {"kB": 1 / 1024, "KB": 1 / 1024, "MB": 1, "GB": 1024}

_TOKEN = re.compile(r"\([^()]*\)|(?:[^\s\[\]()]|\[[^\[\]]*\])+|\S")
_DATE = re.compile(r"\d\d-\d\d-\d{4}")
_TIME = re.compile(r"\d\d:\d\d:\d\d")
_MEMORY = re.compile(r"(\d{1,9})/(\d{1,9})(kB|KB|MB|GB)")
_CORES = re.compile(r"\[([^\[\]]*)\](?:@(\d{1,6}))?")
_CORE = re.compile(r"(\d{1,3})%(?:@(\d{1,6}))?")
_TEMPERATURE = re.compile(r"([A-Za-z][\w.-]*)@(-?\d{1,4}(?:\.\d{1,6})?)C(?:/-?\d{1,4}(?:\.\d{1,6})?C)?")
_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
_RAIL = re.compile(r"(?:VDD|VIN|POM|AVDD|CVB)(?:_[A-Z0-9_]+)?|VDDRQ|SYS5V")  # what a lone number without unit may name
_POWER = re.compile(r"(-?\d{1,7})(mW)?(?:/(-?\d{1,7})(?:mW)?)?(?:/(-?\d{1,7})(?:mW)?)?")
_ENGINE = re.compile(r"off|(?:(\d{1,3})%)?(?:@(?:(\d{1,6})|\[([\d,\s]{0,200})\]))?|(\d{1,6})")
_LOADS = {"EMC_FREQ": "emc", "EMC": "emc", "GR3D_FREQ": "gr3d", "GR3D": "gr3d"}


class BrokenLineError(EdgeError):
    """A line that tegrastats cannot have written whole. The message says what was found."""


def parse_line(line: str) -> Reading:
    """The reading of one line. Raises BrokenLineError for a cut off, merged or foreign one."""
    return _Line(line).reading()


class _Line:
    """The tokens of a line, eaten from the left."""

    def __init__(self, line: str) -> None:
        self._tokens = _TOKEN.findall(line)
        self._at = 0
        self._fields: dict[str, Any] = {}
        self._maps: dict[str, Any] = {"temperatures_c": {}, "power_mw": {}, "engines": {}, "unknown": {}}
        self._unknown: str | None = None  # the field that words without a place belong to

    def reading(self) -> Reading:
        while self._at < len(self._tokens):
            self._field()
        unknown = self._maps.pop("unknown")
        if not self._fields and not any(self._maps.values()):
            raise BrokenLineError(f"no field of tegrastats in {' '.join(self._tokens)!r:.60}")
        return Reading(**self._fields, **self._maps, unknown=unknown)

    def _field(self) -> None:
        """Eat one field."""
        name = self._take()
        if _DATE.fullmatch(name) and _TIME.fullmatch(self._next):
            self._put("time", _iso(name, self._take()))
        elif match := _TEMPERATURE.fullmatch(name):
            degrees = float(match[2])
            self._put_in("temperatures_c", match[1], None if degrees == UNREADABLE_C else degrees)
        elif name in ("RAM", "SWAP"):
            self._memory(name)
        elif name in ("CPU", "cpu") and not _POWER.fullmatch(self._next):
            self._cores()
        elif name in _LOADS:
            self._load(name)
        elif _NAME.fullmatch(name) and self._value(name):
            pass
        else:
            self._keep(name)
            return
        self._unknown = None

    def _memory(self, name: str) -> None:
        match = self._expect(name, _MEMORY)
        used, total = (_scaled(int(match[i]), match[3]) for i in (1, 2))
        self._put(f"{name.lower()}_used_mib", used)
        if name == "RAM":
            self._put("ram_total_mib", total)
        if self._next.startswith("("):  # largest free block; swap that is in RAM as well
            self._take()

    def _cores(self) -> None:
        match = self._expect("CPU", _CORES)
        words = [word.strip() for word in match[1].split(",")]
        cores = [None if word == "off" else _CORE.fullmatch(word) for word in words]
        if any(core is None and word != "off" for core, word in zip(cores, words, strict=True)):
            raise BrokenLineError(f"CPU: found {match[0]!r:.60}, expected [LOAD%@MHZ,off,...]")
        self._put("cpu_percent", tuple(core and int(core[1]) for core in cores))
        self._put("cpu_mhz", tuple(_number(core[2] or match[2]) if core else None for core in cores))

    def _load(self, name: str) -> None:
        match, kind = self._expect(name, _ENGINE), _LOADS[name]
        clocks = _clocks(match)
        self._put(f"{kind}_percent", _number(match[1]))
        self._put(f"{kind}_mhz", clocks if kind == "gr3d" else clocks[0] if clocks else None)

    def _value(self, name: str) -> bool:
        """A rail or an engine; False when what follows the name is no value of either."""
        value = self._next
        power, engine = _POWER.fullmatch(value), _ENGINE.fullmatch(value)
        if power and value.count("mW") not in (0, value.count("/") + 1):
            power = None  # cut off
        if power and ("/" in value or power[2] or _RAIL.fullmatch(name)):
            current, _, average, peak = power.groups()
            self._put_in("power_mw", name, Power(int(current), _number(average), _number(peak)))
        elif _RAIL.fullmatch(name):
            raise BrokenLineError(f"{name}: found {value or 'the end of the line'!r:.60}, expected milliwatts")
        elif value and engine:
            unit = Unit(on=value != "off", percent=_number(engine[1]), mhz=_clocks(engine))
            self._put_in("engines", name, unit)
        else:
            return False
        self._take()
        return True

    def _keep(self, word: str) -> None:
        """A word without a place: the name of an unknown field, or more of its text."""
        kept = self._maps["unknown"]
        if self._unknown is None or _NAME.fullmatch(word):
            self._unknown = word
            kept.setdefault(word, "")
        else:
            kept[self._unknown] = f"{kept[self._unknown]} {word}".lstrip()

    @property
    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self) -> str:
        word: str = self._tokens[self._at]
        self._at += 1
        return word

    def _expect(self, name: str, form: re.Pattern[str]) -> re.Match[str]:
        match = form.fullmatch(self._next)
        if match is None or not self._next:
            raise BrokenLineError(f"{name}: found {self._next or 'the end of the line'!r:.60}")
        self._take()
        return match

    def _put(self, name: str, value: Any) -> None:
        if name in self._fields:
            raise BrokenLineError(f"{name} stands there twice: two lines in one?")
        self._fields[name] = value

    def _put_in(self, group: str, name: str, value: Any) -> None:
        if name in self._maps[group]:
            raise BrokenLineError(f"{name} stands there twice: two lines in one?")
        self._maps[group][name] = value


def _iso(date: str, time: str) -> str:
    try:
        return datetime.strptime(f"{date} {time}", "%m-%d-%Y %H:%M:%S").isoformat()
    except ValueError:
        raise BrokenLineError(f"{date} {time} is no time (expected month-day-year)") from None


def _scaled(value: int, unit: str) -> float:
    mib = value * _MIB[unit]
    return int(mib) if mib == int(mib) else mib


def _clocks(match: re.Match[str]) -> tuple[int, ...]:
    if match[3] is not None:
        words = re.findall(r"\d+", match[3])
        if any(len(word) > 6 for word in words):
            raise BrokenLineError(f"[{match[3]:.40}]: not clocks in MHz")
        return tuple(map(int, words))
    single = match[2] or match[4]
    return (int(single),) if single else ()


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)
