"""What an engine is asked, and what was observed: the files between environments that have nothing else in common.

Legend: T tokens of a text, L layers with experts, K experts per token, N new tokens of an answer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Request:
    """Texts to be read and prompts to be answered greedily, as token ids. `model`: a folder or file of the engine."""

    model: str
    dtype: str
    texts: list[list[int]]
    prompts: list[list[int]]
    new_tokens: int

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Request:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass
class Observed:
    """One array per text or prompt.

    `experts` [T, L, K] int, ascending; `scores` [T - 1] fp32, log-probability of each next token of the text; `best`
    [T - 1], the token the model would have said instead; `answers` [N]. The reference adds `answer_margins` [N], the
    distance of the two best log-probabilities.
    """

    experts: list[Array]
    scores: list[Array]
    best: list[Array]
    answers: list[Array]
    answer_margins: list[Array] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it as one .npz."""
        arrays = {f"{name}.{i}": a for name, found in self._lists().items() for i, a in enumerate(found)}
        np.savez(path, facts=np.array(json.dumps(self.facts)), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Observed:
        """Read what `save` wrote."""
        with np.load(path) as file:
            found: dict[str, dict[int, Array]] = {}
            for key in file.files:
                if key != "facts":
                    name, number = key.rsplit(".", 1)
                    found.setdefault(name, {})[int(number)] = file[key]
            facts = json.loads(str(file["facts"]))
        lists = {name: [rows[i] for i in range(len(rows))] for name, rows in found.items()}
        for name in ("experts", "scores", "best", "answers"):
            lists.setdefault(name, [])
        return cls(**lists, facts=facts)

    def _lists(self) -> dict[str, list[Array]]:
        return {name: value for name, value in vars(self).items() if name != "facts"}


def stack_rows(layers: list[list[Array]], tokens: int) -> Array:
    """[T, L, K] ascending, from the parts [n, K] that each layer has seen in turn."""
    rows = [np.concatenate(parts) for parts in layers]
    if any(len(found) < tokens for found in rows):
        raise RuntimeError(f"routing of {min(map(len, rows))} tokens seen, wanted {tokens}")
    return np.sort(np.stack([found[:tokens] for found in rows], axis=1), axis=-1)


def next_scores(logits: Array, text: list[int]) -> tuple[Array, Array]:
    """Log-probability [T - 1] of each next token, and the best token [T - 1], from logits [T, V]."""
    wide = logits[:-1].astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    log_p = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return log_p[np.arange(len(log_p)), text[1:]].astype(np.float32), log_p.argmax(-1)
