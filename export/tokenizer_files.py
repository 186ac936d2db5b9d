"""The tokenizer of a checkpoint: copied as it is, its settings reduced to what a runtime uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.errors import BundleError, CheckpointError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SETTINGS = (*_SPECIAL, "add_bos_token", "add_eos_token", "tokenizer_class")
_GENERATION = (
    "bos_token_id",
    "eos_token_id",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
)
_MAX_BYTES = 256 << 20


def tokenizer_files(path: Path, generation: dict[str, Any]) -> dict[str, bytes]:
    """Bundle files below tokenizer/ by path; empty when the checkpoint has no tokenizer.json.

    `generation` is generation_config.json. Raises CheckpointError naming the file that is damaged.
    """
    if not (path / "tokenizer.json").is_file():
        return {}
    files = {"tokenizer.json": _read(path / "tokenizer.json")}
    _object(path / "tokenizer.json", files["tokenizer.json"])
    settings: dict[str, Any] = {}
    if (path / "tokenizer_config.json").is_file():
        source = path / "tokenizer_config.json"
        settings = _object(source, _read(source))
        files["tokenizer_config.json"] = _dump({k: settings[k] for k in _SETTINGS if settings.get(k) is not None})
    if (path / "special_tokens_map.json").is_file():
        files["special_tokens_map.json"] = _read(path / "special_tokens_map.json")
    template = _template(path, settings)
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    defaults = {k: generation[k] for k in _GENERATION if generation.get(k) is not None}
    if defaults:
        files["generation_config.json"] = _dump(defaults)
    _check(path, files)
    return {f"tokenizer/{name}": data for name, data in files.items()}


def _check(path: Path, files: dict[str, bytes]) -> None:
    """A bundle whose tokenizer nobody can read looks whole and answers no prompt."""
    from runtime.text import Tokenizer

    try:
        Tokenizer.from_files(files)
    except BundleError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _template(path: Path, settings: dict[str, Any]) -> str | None:
    """The default chat template: a file of its own in newer checkpoints, an entry of the settings in older ones."""
    if (path / "chat_template.jinja").is_file():
        return _read(path / "chat_template.jinja").decode("utf-8")
    if (path / "chat_template.json").is_file():
        source = path / "chat_template.json"
        settings = _object(source, _read(source))
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template is neither a text nor a list of named texts")
    return template


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{file}: larger than {_MAX_BYTES >> 20} MiB")
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None


def _object(file: Path, data: bytes) -> dict[str, Any]:
    # Not the strict parser: published settings hold integers of 31 digits (model_max_length), which are not used.
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}): download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _dump(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
