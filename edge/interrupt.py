"""Ctrl-C that lets the token in work be finished, so that records are whole and the engine stays usable."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """While entered, the first Ctrl-C sets `requested`; the second raises KeyboardInterrupt.

    `at_once` makes the first one raise too: for a long step whose engine is not needed afterwards. `note` is written
    to stderr at the first one, for otherwise nothing would be seen of it until the token in work is done.
    """

    def __init__(self, at_once: bool = False, note: str = "") -> None:
        self.at_once = at_once
        self._text = note
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested or self.at_once:
            self.requested = True
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, self._text.encode())  # not print: this may have interrupted one
