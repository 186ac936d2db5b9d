"""One answer, from the engine to stdout, with Ctrl-C on the way."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge.interrupt import Interrupt

if TYPE_CHECKING:
    from runtime.engine import Engine, GenerateOptions


def print_answer(
    engine: Engine, prompt: str | Sequence[int], options: GenerateOptions, interrupt: Interrupt, silent: bool = False
) -> str:
    """Print tokens as they come and return their text; ends after the token in work when `interrupt` is requested.

    `silent` prints nothing. Raises what the engine raises, and KeyboardInterrupt where `interrupt` does.
    """
    tokens = engine.generate(prompt, options)
    printer, pieces = Printer(words=engine.tokenizer is not None, silent=silent), []
    try:
        for token in tokens:
            interrupt.at_once = False  # the prompt is read: from here on a token is worth waiting for
            pieces.append(token.text)
            printer.show(token.text, token.id)
            if interrupt.requested:
                break
    finally:
        tokens.close()  # the run's record ends here, whatever happened
        printer.end()
    return "".join(pieces)


class Printer:
    """Writes an answer to stdout piece by piece: words, or token ids where a bundle has no tokenizer."""

    def __init__(self, words: bool, silent: bool = False) -> None:
        self._words = words
        self._silent = silent
        self._last = ""

    def show(self, text: str, token_id: int) -> None:
        """One token. Ids are separated by commas, so that they can be given to --prompt-ids."""
        piece = text if self._words else f",{token_id}" if self._last else f"{token_id}"
        if piece and not self._silent:
            sys.stdout.write(piece)
            sys.stdout.flush()
            self._last = piece

    def end(self) -> None:
        """Finish the line."""
        if self._last and not self._last.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
