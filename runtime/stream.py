"""Token ids to text while they arrive: whole characters only, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

_BROKEN = "\ufffd"  # what decoders make of bytes that are no character, or not yet one


class StreamDecoder:
    """Text of a growing list of ids; what `push` and `finish` return together equals decoding all ids at once.

    `decode` maps ids to text; ids for which `silent` holds (special tokens) have none. `byte_ids` are tokens of one
    raw byte each, as sentencepiece models have them: a run of those is decoded as a whole, one wrong byte changes what
    the others mean, so the run is held back until it ends. `stop_ids` end the text like a stop string does.

    With stop strings the text ends before the one that is complete first (of those the longest), wherever the borders
    between tokens lie; text that may be the beginning of one is held back until that is decided.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        silent: Callable[[int], bool] = lambda token_id: False,
        byte_ids: Collection[int] = (),
        stop_ids: Collection[int] = (),
    ) -> None:
        self.text = ""  # all that was returned so far
        self.stopped = False
        self._decode = decode
        self._stops = StopStrings(stop)
        self._silent = silent
        self._byte_ids = byte_ids
        self._stop_ids = stop_ids
        # Only a short window of ids is decoded at each step. It starts with ids whose text is out already: decoders
        # treat the first token of a text differently (its leading space), so a window must not begin with the new one.
        self._window: list[int] = []
        self._settled = 0  # ids of the window up to the last point where the text was whole
        self._shown = 0  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        """Take one id; return the text that may be printed now, often "" ."""
        if self.stopped:
            return ""
        if token_id in self._stop_ids:
            return self._release(self._decode_window(final=True), ends=True)
        if self._silent(token_id):
            return ""
        self._window.append(token_id)
        if token_id in self._byte_ids:
            return ""
        return self._release(self._decode_window(final=False))

    def finish(self) -> str:
        """No more ids will come: return what was held back."""
        if self.stopped:
            return ""
        return self._release(self._decode_window(final=True), ends=True)

    def _decode_window(self, final: bool) -> str:
        text = self._decode(self._window)
        whole = final or not text.endswith(_BROKEN)
        # An unfinished character is exactly one mark at the end; marks before it are wrong bytes and stay.
        end = len(text) if whole else len(text) - 1
        fresh, self._shown = text[self._shown : end], max(self._shown, end)
        if whole:
            self._slide()
        return fresh

    def _slide(self) -> None:
        recent = self._window[self._settled :]
        text = self._decode(recent)
        if text:
            self._window, self._shown = recent, len(text)
        self._settled = len(self._window)

    def _release(self, fresh: str, ends: bool = False) -> str:
        out, found = self._stops.feed(fresh)
        if not found and ends:
            out += self._stops.flush()
        self.stopped = self.stopped or found or ends
        self.text += out
        return out


class StopStrings:
    """Finds the first complete stop string in text that arrives in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Add text; return what is certainly before any stop string, and whether one is complete."""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at = min(found)
            out, self._held = self._held[:at], ""
            return out, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out, False

    def flush(self) -> str:
        """What is held back, for no more text will come."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
