"""The tegrastats program as a source: its own process group, lines read by a thread, ended for certain.

tegrastats never ends by itself, and `tegrastats --stop` would stop everybody's. So it is a group of its own here, which
is told to end, then made to. Should this process be killed, its next line meets a closed pipe and ends it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from typing import IO

from profiles.telemetry.source import Sample, Sink, TelemetryError
from profiles.telemetry.tegrastats_line import BrokenLineError, parse_line

PROGRAM = "tegrastats"
FIRST_LINE_S = 5.0
TERMINATE_S = 2.0
_LINE_BYTES = 1 << 16  # what has no newline by then is garbage
_SILENT_INTERVALS = 10  # so many without a line are a gap worth telling
_TALK_BYTES = 300


class TegrastatsSource:
    """`first_line_s` is how long the first line may take, `terminate_s` how long it may take to end when told."""

    name = PROGRAM

    def __init__(self, interval_s: float, first_line_s: float = FIRST_LINE_S, terminate_s: float = TERMINATE_S) -> None:
        self._interval_s, self._first_line_s, self._terminate_s = interval_s, first_line_s, terminate_s
        self._silent_s = max(1.0, _SILENT_INTERVALS * interval_s)
        self._process: subprocess.Popen[bytes] | None = None
        self._talk: IO[bytes] | None = None
        self._ready, self._closing = threading.Event(), False
        self._lines = 0
        self._broken: list[str] = []
        self._gaps_s: list[float] = []
        self._ended: str | None = None  # how it ended by itself
        self._stuck: str | None = None

    @property
    def problems(self) -> list[str]:
        found = [] if self._ended is None else [f"{self._ended}; there is no telemetry after it"]
        if self._gaps_s:
            found.append(f"no line for up to {max(self._gaps_s):.1f} s ({len(self._gaps_s)} gaps)")
        if self._stuck:
            found.append(self._stuck)
        if self._broken:
            found.append(f"{len(self._broken)} lines could not be read, the first: {self._broken[0]}")
        return [f"{self.name}: {text}" for text in found]

    def start(self, sink: Sink) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            raise TelemetryError(f"{PROGRAM}: no such program on PATH: it comes with JetPack; try --telemetry host")
        command = [program, "--interval", str(round(self._interval_s * 1000))]
        self._talk = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close(); a pipe could fill up
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._talk, start_new_session=True
            )
        except OSError as error:
            self._talk.close()
            raise TelemetryError(f"{program}: {error.strerror}") from None
        self._thread = threading.Thread(target=self._read, args=(sink,), name=PROGRAM, daemon=True)
        self._thread.start()
        in_time = self._ready.wait(self._first_line_s)
        if not self._lines:
            self.close()
            what = self._ended or f"no line that can be read in {self._first_line_s:g} s"
            if in_time is False and self._broken:
                what += f" (instead: {self._broken[0]})"
            raise TelemetryError(f"{self.name}: {what}: run `{' '.join(command)}` to see, or try --telemetry host")

    def close(self) -> None:
        if self._process is None:
            return
        self._closing = True
        process, self._process = self._process, None
        if not _has_ended(process.pid, 0):
            _signal_group(process.pid, signal.SIGTERM)
            _has_ended(process.pid, self._terminate_s)
        # The leader is not reaped yet, so its number still names our group and no other: end whoever is left in it.
        _signal_group(process.pid, signal.SIGKILL)
        if not _has_ended(process.pid, self._terminate_s):
            self._stuck = f"process {process.pid} does not end: see `ps`, and end it as root"
            return
        process.wait()
        self._thread.join()
        if process.stdout is not None:
            process.stdout.close()
        if self._talk is not None:
            self._talk.close()

    def _read(self, sink: Sink) -> None:
        process = self._process
        assert process is not None and process.stdout is not None
        before = begin = time.monotonic()
        while line := process.stdout.readline(_LINE_BYTES):
            now = time.monotonic()
            if self._lines and now - before > self._silent_s:
                self._gaps_s.append(now - before)
            before = now
            self._take(line, sink)
        if not self._closing:
            self._ended = f"ended by itself after {time.monotonic() - begin:.1f} s{self._last_words(process.pid)}"
        elif self._lines and time.monotonic() - before > self._silent_s:
            self._gaps_s.append(time.monotonic() - before)
        self._ready.set()

    def _take(self, line: bytes, sink: Sink) -> None:
        now = time.monotonic_ns()
        try:
            reading = parse_line(line.decode("utf-8", errors="replace"))
        except BrokenLineError as error:
            self._broken.append(str(error))
            return
        sink(Sample(now, reading))
        self._lines += 1
        self._ready.set()

    def _last_words(self, pid: int) -> str:
        """Exit code and the end of its stderr; it is not reaped here."""
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) if _has_ended(pid, 1.0) else None
        code = f" (exit code {found.si_status})" if found is not None else ""
        assert self._talk is not None
        self._talk.seek(max(0, self._talk.seek(0, os.SEEK_END) - _TALK_BYTES))
        words = " ".join(self._talk.read().decode("utf-8", errors="replace").split())
        return f"{code}{f', saying {words!r}' if words else ''}"


def _has_ended(pid: int, seconds: float) -> bool:
    """Whether the process ends within `seconds`, without reaping it."""
    end = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() >= end:
            return False
        time.sleep(0.01)
    return True


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left in the group (PermissionError: only zombies, on some kernels)
