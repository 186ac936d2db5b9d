"""Ctrl-C and SIGTERM that let the token in work be finished, so that records are whole and the engine stays usable."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM: like Ctrl-C, but it is the program that is to end, whatever it is doing."""


class Termination:
    """While entered, SIGTERM does what Ctrl-C would do then, or raises Terminated where nothing waits for Ctrl-C.

    `received` tells the two apart afterwards. Only the main thread may receive signals; elsewhere nothing is changed.
    """

    def __init__(self) -> None:
        self.received = False
        self._installed = threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def __enter__(self) -> Termination:
        if self._installed:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler) or handler is signal.default_int_handler:
            raise Terminated
        handler(number, frame)


class Interrupt:
    """While entered, the first Ctrl-C sets `requested`; the second raises KeyboardInterrupt. SIGTERM is the same and
    sets `terminated`, too.

    `at_once` makes the first one raise too: for a long step whose engine is not needed afterwards. `note` is written
    to stderr at the first Ctrl-C, for otherwise nothing would be seen of it until the token in work is done.
    """

    def __init__(self, at_once: bool = False, note: str = "") -> None:
        self.at_once = at_once
        self._text = note
        self.requested = False
        self.terminated = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.terminated = self.terminated or number == signal.SIGTERM
        again, self.requested = self.requested, True
        if again or self.at_once:
            raise Terminated if self.terminated else KeyboardInterrupt
        if not self.terminated:
            os.write(2, self._text.encode())  # not print: this may have interrupted one
