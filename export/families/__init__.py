"""The model families that can be exported, by the model_type of their config.json."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from export.families.base import Family
from export.families.deepseek_v2 import DeepseekV2
from export.families.deepseek_v3 import DeepseekV3
from export.families.glm4_moe import Glm4Moe
from export.families.granitemoe import GraniteMoe
from export.families.mixtral import Mixtral
from export.families.olmoe import Olmoe
from export.families.qwen2_moe import Qwen2Moe
from export.families.qwen3_moe import Qwen3Moe
from runtime.config import ModelConfig
from runtime.errors import BundleError, CheckpointError


def families() -> dict[str, Family]:
    """Every known family, by model_type."""
    known = (Qwen2Moe(), Qwen3Moe(), Olmoe(), Mixtral(), GraniteMoe(), DeepseekV2(), DeepseekV3(), Glm4Moe())
    return {family.model_type: family for family in known}


def family_of(raw: dict[str, Any]) -> Family:
    """The family of a config.json. Raises CheckpointError listing the known ones."""
    known = families()
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        found = repr(model_type) if model_type is not None else "missing"
        raise CheckpointError(f"config.json: model_type is {found:.80}; known architectures: {', '.join(known)}")
    return known[model_type]


def parse_config(raw: dict[str, Any]) -> ModelConfig:
    """A config.json in our own words, checked. Raises CheckpointError naming the option or the sizes at fault."""
    config = family_of(raw).parse(raw)
    try:
        config.check()
    except BundleError as error:
        raise CheckpointError(f"config.json ({config.family}): {error}") from None
    return config


def read_model(raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    """config.json and generation_config.json in our own words. Raises CheckpointError."""
    config = parse_config(raw)
    more = generation.get("eos_token_id")
    ends = more if isinstance(more, list) else [] if more is None else [more]
    if any(type(token) is not int for token in ends):
        raise CheckpointError(f"generation_config.json: eos_token_id = {more!r:.80} is no token id, nor a list of them")
    # Chat checkpoints name the end of a turn only there.
    return replace(config, eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *ends])))
