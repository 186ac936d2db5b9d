"""Writes the twin as a checkpoint folder that transformers and `edge export` read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from demo.native.corpus import END_OF_TEXT_ID, tokenizer_config
from demo.native.model import NativeModel, hub_config, hub_state

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WEIGHTS = "model.safetensors"


def save_checkpoint(model: NativeModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights, config and tokenizer into `folder`; the weights appear whole or not at all."""
    from safetensors.torch import save_file

    end = END_OF_TEXT_ID
    _write_json(folder / "config.json", hub_config(model.config, end))
    _write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": end})
    _write_json(folder / "tokenizer_config.json", tokenizer_config(model.config.context))
    tokenizer.save(str(folder / "tokenizer.json"))
    partial = folder / f"{WEIGHTS}.partial"
    save_file(hub_state(model), partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
