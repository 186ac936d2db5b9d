"""What a telemetry source is, and the kind that is asked again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from profiles.telemetry.reading import Reading
from runtime.errors import EdgeError


@dataclass(frozen=True)
class Sample:
    """A reading and when it was taken: CLOCK_MONOTONIC nanoseconds, the clock of the token records."""

    time_ns: int
    reading: Reading

    def to_json(self) -> dict[str, Any]:
        return {"type": "telemetry", "time_ns": self.time_ns, **self.reading.to_json()}


Sink = Callable[[Sample], None]


class TelemetryError(EdgeError):
    """A source that cannot be used, or has failed. One line: which source, what happened, what to do."""


class Source(Protocol):
    """Samples from `start` to `close`, handed to the sink from a thread of the source.

    `start` returns once the first sample has come, or raises TelemetryError and leaves nothing running. What goes wrong
    later ends no run: it is told by `problems`, complete after `close`.
    """

    name: str

    @property
    def problems(self) -> list[str]: ...

    def start(self, sink: Sink) -> None: ...

    def close(self) -> None:
        """End it; nothing of it runs afterwards. Safe to call twice, and without `start`."""
        ...


class PolledSource:
    """Calls `read` every `interval_s` seconds. A reading that fails is a problem, the next may work."""

    def __init__(self, name: str, read: Callable[[], Reading], interval_s: float) -> None:
        self.name = name
        self._read, self._interval_s = read, interval_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failures: list[str] = []

    @property
    def problems(self) -> list[str]:
        if not self._failures:
            return []
        return [f"{self.name}: {len(self._failures)} readings failed, the first: {self._failures[0]}"]

    def start(self, sink: Sink) -> None:
        """The first reading is taken here, so that a source without rights or files is known at once."""
        try:
            first = self._read()
        except (OSError, EdgeError) as error:
            raise TelemetryError(f"{self.name}: {_text(error)}") from None
        sink(Sample(time.monotonic_ns(), first))
        self._thread = threading.Thread(target=self._poll, args=(sink,), name=self.name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _poll(self, sink: Sink) -> None:
        due = time.monotonic()
        while True:
            due = max(due + self._interval_s, time.monotonic())
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            try:
                reading = self._read()
            except (OSError, EdgeError) as error:
                self._failures.append(_text(error))
            else:
                sink(Sample(time.monotonic_ns(), reading))


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)
