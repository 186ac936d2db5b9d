"""Sources by name, and `auto`: the best one that works here, with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from profiles.telemetry.files import sysfs_source
from profiles.telemetry.host import host_source
from profiles.telemetry.jtop import JtopSource
from profiles.telemetry.source import Sink, Source, TelemetryError
from profiles.telemetry.tegrastats import PROGRAM, TegrastatsSource
from runtime.errors import UsageError

INTERVAL_S = 0.2  # more often than the sensors of a Jetson are updated (430 ms), so that no update is missed

_MAKERS: dict[str, Callable[[float], Source]] = {
    "tegrastats": TegrastatsSource,
    "jtop": JtopSource,
    "sysfs": sysfs_source,
    "host": host_source,
}
CHOICES = ("auto", *_MAKERS, "none")


def start_source(name: str, sink: Sink, interval_s: float = INTERVAL_S) -> tuple[Source | None, str]:
    """A started source, and one line that says which and why; None for "none".

    `auto` takes the first that works of tegrastats, jtop, sysfs, host. Raises TelemetryError when a source that was
    named does not work: nobody gets other figures than they asked for.
    """
    if name not in CHOICES:
        raise UsageError(f"unknown telemetry {name!r} (known: {', '.join(CHOICES)})")
    if name == "none":
        return None, "telemetry: none, as asked for"
    if name != "auto":
        return _started(name, sink, interval_s), f"telemetry: {name}, as asked for"
    refused = []
    for candidate in _MAKERS:
        try:
            source = _started(candidate, sink, interval_s)
        except TelemetryError as error:
            refused.append(str(error))
            continue
        # A board whose own tool failed must hear why; a laptop need not hear of a tool that it cannot have.
        why = refused if shutil.which(PROGRAM) else [reason.split(":")[0] + " is not there" for reason in refused]
        return source, f"telemetry: {candidate}" + (f" ({'; '.join(why)})" if why else "")
    raise TelemetryError(f"no telemetry source works here: {'; '.join(refused)}")


def _started(name: str, sink: Sink, interval_s: float) -> Source:
    source = _MAKERS[name](interval_s)
    source.start(sink)
    return source
