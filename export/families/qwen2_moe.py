"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): shared expert behind a sigmoid gate, biased q, k and v."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from export.families.base import Family
from export.families.options import Options
from export.families.parts import basics, grouped_query, sparse_layers
from runtime.config import ModelConfig, RouterConfig


class Qwen2Moe(Family):
    """Checkpoints whose model_type is qwen2_moe."""

    model_type = "qwen2_moe"

    def parse(self, raw: dict[str, Any]) -> ModelConfig:
        """See Family.parse."""
        o = Options(raw)
        hidden, heads, layers = o.size("hidden_size"), o.size("num_attention_heads"), o.size("num_hidden_layers")
        context = o.size("max_position_embeddings")
        head_dim = o.size("head_dim", hidden // heads)
        o.full_attention(o.flag("use_sliding_window", False), context)
        sparse = sparse_layers(layers, o.size("decoder_sparse_step", 1), o.integers("mlp_only_layers"))
        shared = o.size("shared_expert_intermediate_size", least=0)
        dense = o.size("intermediate_size", 0, least=0)
        config = ModelConfig(
            **basics(o),
            norm_eps=o.number("rms_norm_eps", 1e-6),
            attention=replace(
                grouped_query(heads, o.size("num_key_value_heads", heads), head_dim),
                qkv_bias=o.flag("qkv_bias", True),
            ),
            rope=o.rope(head_dim, context),
            router=RouterConfig(o.experts(), o.size("num_experts_per_tok"), normalise=o.flag("norm_topk_prob", False)),
            moe_layers=sparse,
            expert_intermediate_size=o.size("moe_intermediate_size"),
            shared_intermediate_size=shared,
            shared_gate=shared > 0,
            dense_intermediate_size=dense if len(sparse) < layers else 0,
        )
        o.finish()
        return config
