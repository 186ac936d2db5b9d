"""What the mixture is trained on besides chats that the dense model wrote: speeches, a novel, a manual, Python."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from demo import data
from profiles.packages import Package, fetch_package

CODE = Package(  # BSD-3-Clause: functions with long docstrings
    "networkx==3.4.2",
    "networkx-3.4.2-py3-none-any.whl",
    "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f",
    1_723_263,
)
PIECE = 12_000  # characters of a document that are used, so that no single one rules


def training_rows(tokenizer: Any, download: Path, rows: int, length: int) -> torch.Tensor:
    """Token ids [rows, length] int64 of prose, a manual and code, a third each, documents one after the other."""
    sources = (data.load("prose", "train", download), data.load("docs", "train", download), _modules(download))
    return torch.cat([_rows(tokenizer, texts, rows // len(sources), length) for texts in sources])


def _modules(download: Path) -> list[str]:
    """Modules of the code package, its tests left out, in an order that mixes its folders."""
    with zipfile.ZipFile(fetch_package(CODE, download)) as archive:
        names = [n for n in archive.namelist() if n.endswith(".py") and "/tests/" not in n]
        return [archive.read(name).decode() for name in sorted(names, key=lambda name: name[::-1])]


def _rows(tokenizer: Any, texts: list[str], rows: int, length: int) -> torch.Tensor:
    end = tokenizer.token_to_id("<|endoftext|>")
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text[:PIECE]).ids, end]
        if len(ids) >= rows * length:
            break
    count = min(rows, len(ids) // length)
    return torch.tensor(ids[: count * length]).view(count, length)
