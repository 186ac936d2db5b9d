"""Where a checkpoint is and what its JSON files say; nothing of it is ever executed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from runtime.errors import BundleError, CheckpointError, EdgeError
from runtime.strict import parse_json

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]
_MAX_JSON_BYTES = 64 << 20


def find_source(name: str | Path) -> Path:
    """The folder of a checkpoint: `name` itself, or the local copy of a hub model named like "org/model".

    Raises CheckpointError when there is neither, EdgeError when the download fails.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: a checkpoint is a folder with config.json and *.safetensors, this is a file")
    if not _HUB_NAME.fullmatch(str(name)):
        raise CheckpointError(f"{path}: no such folder")
    return _download(str(name))


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder (or that file itself), refused when it asks for code or is quantised.

    Raises CheckpointError.
    """
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: missing: a checkpoint folder has config.json beside its *.safetensors")
    config = read_json(file)
    if config.get("auto_map") and not _known_code(config):
        raise CheckpointError(
            f"{file}: auto_map names Python code of its own, which is never run: use a checkpoint of a built-in "
            "architecture (transformers converts most: model.save_pretrained(DIR))"
        )
    if config.get("quantization_config"):
        quantization = config["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"{file}: quantization_config ({method or 'no method named'}): quantised weights are not supported, "
            "export the original bf16, fp16 or fp32 checkpoint"
        )
    return config


def _known_code(config: dict[str, Any]) -> bool:
    """Whether auto_map names nothing but classes that a family of ours stands for (DeepSeek's, from before transformers
    had them).
    """
    from export.families import families  # the other way round they need nothing from here

    family, named = families().get(str(config.get("model_type"))), config["auto_map"]
    return family is not None and isinstance(named, dict) and family.code.issuperset(map(str, named.values()))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, duplicate keys and NaN refused. Raises CheckpointError naming the file."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_JSON_BYTES >> 20} MiB")
        value = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name}: no such folder, and to download it as a hub name this needs: pip install 'remoe-edge[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client and the HTTP library below it have no common base class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise EdgeError(f"{name}: no such folder, and downloading it from the hub failed: {reason[0]}") from error
