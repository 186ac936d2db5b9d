"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): no shared expert, RMSNorm of q and k per head."""

from __future__ import annotations

from typing import Any

from export.families.base import Family, sparse_layers
from export.families.options import Options
from runtime.config import AttentionConfig, ModelConfig, RouterConfig


class Qwen3Moe(Family):
    """Checkpoints whose model_type is qwen3_moe."""

    model_type = "qwen3_moe"

    def parse(self, raw: dict[str, Any]) -> ModelConfig:
        """See Family.parse."""
        o = Options(raw)
        hidden, heads, layers = o.size("hidden_size"), o.size("num_attention_heads"), o.size("num_hidden_layers")
        context = o.size("max_position_embeddings")
        head_dim = o.size("head_dim", hidden // heads)
        bias = o.flag("attention_bias", False)
        o.full_attention(o.flag("use_sliding_window", False), context)
        sparse = sparse_layers(layers, o.size("decoder_sparse_step", 1), o.integers("mlp_only_layers"))
        dense = o.size("intermediate_size", 0, least=0)
        config = ModelConfig(
            family=self.model_type,
            vocab_size=o.size("vocab_size"),
            hidden_size=hidden,
            num_layers=layers,
            max_context=context,
            norm_eps=o.number("rms_norm_eps", 1e-6),
            activation=o.activation(),
            attention=AttentionConfig(
                kind="gqa",
                num_heads=heads,
                num_kv_heads=o.size("num_key_value_heads", 4),
                head_dim=head_dim,
                v_head_dim=head_dim,
                rope_head_dim=head_dim,
                scale=head_dim**-0.5,
                qkv_bias=bias,
                o_bias=bias,
                qk_norm="head",
            ),
            rope=o.rope(head_dim, context),
            router=RouterConfig(
                num_experts=o.experts(),
                top_k=o.size("num_experts_per_tok"),
                normalise=o.flag("norm_topk_prob", False),
            ),
            moe_layers=sparse,
            expert_intermediate_size=o.size("moe_intermediate_size"),
            dense_intermediate_size=dense if len(sparse) < layers else 0,
            tied_embeddings=o.flag("tie_word_embeddings", False),
            bos_token_id=o.integer("bos_token_id", None),
            eos_token_ids=o.token_ids("eos_token_id"),
        )
        o.finish()
        return config
