"""Mixtral (8x7B, 8x22B): few large experts in every layer, weights of the chosen ones always add up to 1."""

from __future__ import annotations

from typing import Any

from export.families.base import Family
from export.families.options import Options
from export.families.parts import basics, grouped_query
from runtime.config import ModelConfig, RouterConfig


class Mixtral(Family):
    """Checkpoints whose model_type is mixtral."""

    model_type = "mixtral"
    moe = "block_sparse_moe"
    experts_at = ("w1", "w3", "w2")

    def parse(self, raw: dict[str, Any]) -> ModelConfig:
        """See Family.parse."""
        o = Options(raw)
        hidden, heads, layers = o.size("hidden_size"), o.size("num_attention_heads"), o.size("num_hidden_layers")
        context = o.size("max_position_embeddings")
        head_dim = o.size("head_dim", hidden // heads)
        o.full_attention(True, context)
        config = ModelConfig(
            **basics(o),
            norm_eps=o.number("rms_norm_eps", 1e-5),
            attention=grouped_query(heads, o.size("num_key_value_heads", 8), head_dim),
            rope=o.rope(head_dim, context, default_theta=1e6),
            router=RouterConfig(num_experts=o.experts(), top_k=o.size("num_experts_per_tok"), normalise=True),
            moe_layers=tuple(range(layers)),
            expert_intermediate_size=o.size("intermediate_size"),
        )
        o.finish()
        return config
