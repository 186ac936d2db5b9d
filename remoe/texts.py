"""Texts for tuning: files to documents, documents to token ids, token ids packed into sequences of one length.

.txt    one document per file, UTF-8
.jsonl  one document per line: {"text": "..."} or {"messages": [{"role": ..., "content": ...}, ...]} (chat template)

Documents are laid end to end and cut into sequences of equal length; a token knows its document, so that nothing that
compares neighbouring tokens looks across a boundary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe.head import IGNORED
from runtime.errors import UsageError

Messages = list[dict[str, str]]
Document = str | Messages
_LEAST_TOKENS = 2  # a shorter document predicts nothing and has no neighbours


@dataclass(frozen=True)
class Sequences:
    """Packed tokens: `ids` int64 [R, S], `segments` int64 [R, S], the number of the token's document (a document that
    is cut goes on under the next number). `sha256` tells this data from any other.
    """

    ids: Tensor
    segments: Tensor
    sha256: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens in all sequences."""
        return self.ids.numel()

    def split(self, last: int) -> tuple[Sequences, Sequences]:
        """All but the last sequences, and the last ones: held out. Raises UsageError when nothing would be left."""
        if not 0 < last < len(self):
            raise UsageError(
                f"{len(self)} sequences of {self.ids.shape[1]} tokens, of which {last} should be held out: give more "
                "text, a shorter --sequence-length or another --eval-sequences"
            )
        return self.take(slice(0, -last)), self.take(slice(-last, None))

    def take(self, rows: slice) -> Sequences:
        """Some of the sequences."""
        ids, segments = self.ids[rows], self.segments[rows]
        return Sequences(ids, segments, _digest(ids, segments))


@dataclass(frozen=True)
class Batch:
    """Rows of sequences as the model wants them, all [B, S]; `segments` are distinct between rows.

    `positions` start at 0 in every document: transformers then keeps attention within documents. `targets` are the next
    tokens, IGNORED at the end of a document.
    """

    ids: Tensor
    segments: Tensor
    positions: Tensor
    targets: Tensor


def read_documents(paths: Sequence[str | Path]) -> tuple[list[Document], str]:
    """Every document of the files, in order, and the SHA-256 over the files' bytes.

    Raises UsageError naming file and line: missing, of another kind, empty, not UTF-8 text, malformed.
    """
    if not paths:
        raise UsageError("no data files: give .txt or .jsonl files")
    documents: list[Document] = []
    digest = hashlib.sha256()
    for path in map(Path, paths):
        if not path.exists():
            raise UsageError(f"{path}: no such file")
        if path.suffix not in (".txt", ".jsonl"):
            raise UsageError(f"{path}: expected a .txt file (one document) or .jsonl (one JSON object per line)")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None
        digest.update(len(data).to_bytes(8, "little") + data)
        text = _text(data, path)
        documents += [text] if path.suffix == ".txt" else _lines(text, path)
    return documents, digest.hexdigest()


def encode(
    documents: Iterable[Document],
    encode_text: Callable[[str], list[int]],
    chat: Callable[[Messages], list[int]],
    end: int | None,
) -> list[list[int]]:
    """Token ids of each document; a text ends with `end` where the tokenizer has an end-of-text token."""
    encoded = []
    for document in documents:
        if isinstance(document, str):
            ids = encode_text(document)
            encoded.append(ids + [end] if end is not None and ids[-1:] != [end] else ids)
        else:
            encoded.append(chat(document))
    return encoded


def pack(documents: Iterable[Sequence[int]], length: int, vocab_size: int) -> Sequences:
    """Documents end to end, cut into sequences of `length` tokens; what is left over at the end is dropped.

    Raises UsageError when ids are not of this vocabulary or the text is too short for one sequence.
    """
    if not 2 <= length <= 1 << 20:
        raise UsageError(f"sequences of {length} tokens: expected 2 to {1 << 20}")
    kept = [d for d in documents if len(d) >= _LEAST_TOKENS]
    ids = torch.tensor([token for document in kept for token in document], dtype=torch.int64)
    sizes = torch.tensor([len(document) for document in kept], dtype=torch.int64)
    if len(ids) < length:
        raise UsageError(
            f"the text has {len(ids)} tokens, too short for one sequence of {length}: give more, or a shorter "
            "--sequence-length"
        )
    if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
        raise UsageError(
            f"the text has the token id {int(ids.max())}, the model knows 0 to {vocab_size - 1}: the tokenizer is not "
            "that of this model"
        )
    rows = len(ids) // length
    numbers = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    ids, numbers = ids[: rows * length].view(rows, length), numbers[: rows * length].view(rows, length)
    segments = numbers + torch.arange(rows)[:, None]  # one more per row: a document that is cut goes on as another
    return Sequences(ids, segments, _digest(ids, segments))


def batch(sequences: Sequences, rows: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """Some rows of `sequences`, on a device."""
    ids, numbers = sequences.ids[list(rows)], sequences.segments[list(rows)]
    length = ids.shape[1]
    # A row may come twice in a batch, or rows out of order: number the segments anew, each row above the one before.
    local = numbers - numbers[:, :1]
    segments = local + (torch.arange(len(rows)) * (int(local.max()) + 1))[:, None]
    new = torch.ones_like(segments, dtype=torch.bool)
    new[:, 1:] = segments[:, 1:] != segments[:, :-1]
    steps = torch.arange(length).expand_as(ids)
    positions = steps - torch.where(new, steps, 0).cummax(1).values
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = torch.where(new[:, 1:], IGNORED, ids[:, 1:])
    return Batch(*(t.to(device) for t in (ids, segments, positions, targets)))


def _text(data: bytes, path: Path) -> str:
    if not data.strip():
        raise UsageError(f"{path}: empty")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}): is it a binary file?") from None
    if "\0" in text:
        raise UsageError(f"{path}: has zero bytes, so it is no text")
    return text


def _lines(text: str, path: Path) -> list[Document]:
    return [_document(line, f"{path}:{n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]


def _document(line: str, where: str) -> Document:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error})") from None
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return value["text"]
    messages = value.get("messages") if isinstance(value, dict) else None
    if isinstance(messages, list) and messages and all(_is_message(m) for m in messages):
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    raise UsageError(f'{where}: expected {{"text": "..."}} or {{"messages": [{{"role": "...", "content": "..."}}]}}')


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _digest(ids: Tensor, segments: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes() + segments.numpy().tobytes()).hexdigest()
