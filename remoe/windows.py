"""Texts cut into windows of token ids, each of which a model reads as a request of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from remoe.texts import encode, read_documents
from remoe.trace import Origin
from runtime.engine import Engine
from runtime.errors import UsageError

WINDOW = 512  # tokens


def text_windows(
    engine: Engine, paths: Sequence[Path], length: int | None, limit: int | None = None
) -> tuple[list[list[int]], Origin]:
    """The files' documents as windows of at most `length` tokens, `limit` in all, and where they come from.

    Raises UsageError for files that hold no text, a context shorter than a window, or a bundle without tokenizer.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise UsageError(f"{engine.bundle.path} has no tokenizer, so it cannot read a text")
    documents, digest = read_documents(list(paths))
    ids = encode(documents, tokenizer.encode, lambda messages: tokenizer.apply_chat(messages, False), None)
    return windows(ids, window_tokens(engine, length), limit), Origin(", ".join(path.name for path in paths), digest)


def window_tokens(engine: Engine, asked: int | None) -> int:
    """WINDOW, or what the context allows, or what was asked for. Raises UsageError when that is too long."""
    if asked is not None and asked > engine.context:
        raise UsageError(f"--window {asked} is longer than the context of {engine.context}: use --context")
    return min(WINDOW, engine.context) if asked is None else asked


def windows(documents: Sequence[Sequence[int]], length: int, limit: int | None = None) -> list[list[int]]:
    """Token ids of documents, cut into windows of at most `length` tokens that do not cross documents.

    A last window of one token is left out: nothing follows that could be predicted. `limit`: tokens in all.
    Raises UsageError when nothing remains.
    """
    if length < 2:
        raise UsageError(f"--window {length}: expected at least 2 tokens, one to read and one to predict")
    if limit is not None and limit < 2:
        raise UsageError(f"--tokens {limit}: expected at least 2")
    found: list[list[int]] = []
    left = sum(map(len, documents)) if limit is None else limit
    for ids in documents:
        for at in range(0, len(ids), length):
            window = list(ids[at : min(at + length, at + left)])
            left -= len(window)
            if len(window) > 1:
                found.append(window)
    if not found:
        raise UsageError("the text is empty or a single token: there is nothing to predict in it")
    return found
