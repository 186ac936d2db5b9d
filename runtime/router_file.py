"""Router files: the gates of every MoE layer as fp32 safetensors, tuned ones with where they come from.

A tuned file carries __metadata__ {"remoe": JSON of `Provenance`}. Its `base_gates_sha256` binds it to the model whose
gates were tuned: experts, attention and everything else of that model stay as they are, so the gates fit no other.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from runtime.dense import view_tensors
from runtime.errors import BundleError, UsageError
from runtime.layout import padded
from runtime.storage import read_file
from runtime.strict import parse_json
from runtime.whole_file import whole_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT_VERSION = 1
METADATA_KEY = "remoe"
_FIELDS = {
    "format_version": int,
    "base_gates_sha256": str,
    "base_model": str,
    "method": str,
    "options": dict,
    "data": dict,
    "metrics": dict,
    "steps": int,
    "versions": dict,
}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Provenance:
    """Where tuned gates come from.

    `base_gates_sha256` is `gates_sha256` of the gates before tuning, `method` how they were tuned in one word,
    `options` every setting of it, `data` the training text (names, sha256, tokens), `metrics` numbers before and after.
    """

    base_gates_sha256: str
    base_model: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """One line of JSON, keys sorted: equal provenance gives equal bytes."""
        return json.dumps({name: getattr(self, name) for name in _FIELDS}, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str) -> Provenance:
        """Raises BundleError naming the field when it is not what `to_json` writes."""
        value = parse_json(text.encode(), where)
        if not isinstance(value, dict):
            raise BundleError(f"{where}: {METADATA_KEY} is no object")
        version = value.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            raise BundleError(f"{where}: router format {version} was made by a newer release; known: {FORMAT_VERSION}")
        for name, kind in _FIELDS.items():
            if type(value.get(name)) is not kind:
                raise BundleError(f"{where}: {METADATA_KEY}.{name} is missing or no {kind.__name__}")
        unknown = sorted(set(value) - set(_FIELDS))
        if unknown or version != FORMAT_VERSION:
            problem = f"unknown field {unknown[0]!r}" if unknown else f"format_version {version}"
            raise BundleError(f"{where}: {METADATA_KEY}: {problem}")
        return cls(**value)


def gates_sha256(tensors: Mapping[str, torch.Tensor | NDArray[Any]]) -> str:
    """The identity of gates: SHA-256 over the tensors of `layout.router_tensors` sorted by name, each as its name in
    UTF-8, one zero byte, and its values as little-endian fp32.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        digest.update(_fp32_bytes(tensors[name]))
    return digest.hexdigest()


def load_router(path: str | Path, shapes: Shapes) -> tuple[dict[str, torch.Tensor], Provenance | None]:
    """The tensors of a router file and, for a tuned one, its provenance; `shapes` from `layout.router_tensors`.

    Raises UsageError when there is no such file, BundleError when it is damaged or its tensors are not `shapes`.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such router file")
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        data = read_file(directory, path.name, path.stat().st_size)
    finally:
        os.close(directory)
    return view_tensors(data, str(path), shapes), _provenance(data, str(path))


def save_router(path: str | Path, tensors: Mapping[str, torch.Tensor], provenance: Provenance | None) -> None:
    """Write a router file: whole, or not at all. Tensors are stored as fp32 in the order of their names, the data on a
    page; equal input gives equal bytes. Raises EdgeError when the disk fails.
    """
    with whole_file(Path(path)) as file:
        file.write(_header(tensors, provenance))
        for name in sorted(tensors):
            file.write(_fp32_bytes(tensors[name]))


def check_base(provenance: Provenance | None, base_sha256: str, path: str | Path, model: str) -> None:
    """Refuse tuned gates of another model; a file without provenance is taken at its word.

    Raises BundleError naming both models.
    """
    if provenance is not None and provenance.base_gates_sha256 != base_sha256:
        found = provenance.base_gates_sha256
        raise BundleError(
            f"{path}: these gates were tuned from {provenance.base_model!r} (gates {found[:12]}), "
            f"not from {model!r} (gates {base_sha256[:12]}): name a router of this model, or tune one with `edge tune`"
        )


def _header(tensors: Mapping[str, torch.Tensor], provenance: Provenance | None) -> bytes:
    entries: dict[str, Any] = {}
    if provenance is not None:
        entries["__metadata__"] = {METADATA_KEY: provenance.to_json()}
    end = 0
    for name in sorted(tensors):
        shape = list(tensors[name].shape)
        begin, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    total = padded(8 + len(text))
    return (total - 8).to_bytes(8, "little") + text.ljust(total - 8)


def _provenance(data: memoryview, where: str) -> Provenance | None:
    length = int.from_bytes(data[:8], "little")
    metadata = parse_json(bytes(data[8 : 8 + length]), where).get("__metadata__") or {}
    if not isinstance(metadata, dict):
        raise BundleError(f"{where}: __metadata__ is no object")
    text = metadata.get(METADATA_KEY)
    if text is None:
        return None
    if not isinstance(text, str):
        raise BundleError(f"{where}: __metadata__.{METADATA_KEY} is no text")
    return Provenance.from_json(text, where)


def _fp32_bytes(values: torch.Tensor | NDArray[Any]) -> bytes:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float32).numpy()
    return np.ascontiguousarray(values, dtype="<f4").tobytes()
