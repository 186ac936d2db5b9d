"""File systems of the exporter that fail: the seam of export/filesystem.py with a fault at a chosen operation."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from export.filesystem import FileSystem

OPERATIONS = tuple(name for name, value in vars(FileSystem).items() if callable(value) and not name.startswith("_"))


class CountingFileSystem(FileSystem):
    """Counts and lists its operations, from 1 on; `before` is called with the number and name of each."""

    def __init__(self, before: Callable[[int, str], None] = lambda number, name: None) -> None:
        self.log: list[str] = []
        self._before = before
        self._counting = threading.Lock()

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in OPERATIONS:
            return method

        def counted(*args: Any) -> Any:
            with self._counting:
                self.log.append(name)
                number = len(self.log)
            try:
                self._before(number, name)
            except OSError:
                if name == "close":
                    method(*args)  # the kernel closes the descriptor even when it reports an error
                raise
            return method(*args)

        return counted


class FaultyFileSystem(CountingFileSystem):
    """Operation `at` fails with `error`; with `persistent`, all later ones too. `fired` lists those that did."""

    def __init__(self, at: int, error: int, persistent: bool = False, only: str | None = None) -> None:
        super().__init__(self._fail)
        self._at, self._error, self._persistent, self._only = at, error, persistent, only
        self._matching = 0
        self.fired: list[str] = []

    def _fail(self, number: int, name: str) -> None:
        if self._only is not None and name != self._only:
            return
        self._matching += 1
        if self._matching == self._at or (self._persistent and self._matching > self._at):
            self.fired.append(name)
            raise OSError(self._error, os.strerror(self._error))


def killed_at(number: int) -> CountingFileSystem:
    """The process kills itself with SIGKILL in front of operation `number`."""

    def kill(now: int, name: str) -> None:
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return CountingFileSystem(kill)
