"""OLMoE (OLMoE-1B-7B): experts in every layer, RMSNorm over the whole q and k projections, optional clipping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from export.families.base import Family
from export.families.options import Options
from export.families.parts import basics, grouped_query
from runtime.config import ModelConfig, RouterConfig


class Olmoe(Family):
    """Checkpoints whose model_type is olmoe."""

    model_type = "olmoe"

    def parse(self, raw: dict[str, Any]) -> ModelConfig:
        """See Family.parse."""
        o = Options(raw)
        hidden, heads, layers = o.size("hidden_size"), o.size("num_attention_heads"), o.size("num_hidden_layers")
        context = o.size("max_position_embeddings")
        head_dim = hidden // heads
        bias = o.flag("attention_bias", False)
        config = ModelConfig(
            **basics(o),
            norm_eps=o.number("rms_norm_eps", 1e-5),
            attention=replace(
                grouped_query(heads, o.size("num_key_value_heads", heads), head_dim),
                qkv_bias=bias,
                o_bias=bias,
                qk_norm="full",
                clip_qkv=o.number("clip_qkv", None),
            ),
            rope=o.rope(head_dim, context),
            router=RouterConfig(o.experts(), o.size("num_experts_per_tok"), normalise=o.flag("norm_topk_prob", False)),
            moe_layers=tuple(range(layers)),
            expert_intermediate_size=o.size("intermediate_size"),
        )
        o.finish()
        return config
