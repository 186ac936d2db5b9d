"""Mixtral (8x7B, 8x22B): few large experts in every layer, weights of the chosen ones always add up to 1."""

from __future__ import annotations

from typing import Any

from export.families.base import Family
from export.families.options import Options
from runtime.config import AttentionConfig, ModelConfig, RouterConfig


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
            family=self.model_type,
            vocab_size=o.size("vocab_size"),
            hidden_size=hidden,
            num_layers=layers,
            max_context=context,
            norm_eps=o.number("rms_norm_eps", 1e-5),
            activation=o.activation(),
            attention=AttentionConfig(
                kind="gqa",
                num_heads=heads,
                num_kv_heads=o.size("num_key_value_heads", 8),
                head_dim=head_dim,
                v_head_dim=head_dim,
                rope_head_dim=head_dim,
                scale=head_dim**-0.5,
            ),
            rope=o.rope(head_dim, context, default_theta=1e6),
            router=RouterConfig(num_experts=o.experts(), top_k=o.size("num_experts_per_tok"), normalise=True),
            moe_layers=tuple(range(layers)),
            expert_intermediate_size=o.size("intermediate_size"),
            tied_embeddings=o.flag("tie_word_embeddings", False),
            bos_token_id=o.integer("bos_token_id", None),
            eos_token_ids=o.token_ids("eos_token_id"),
        )
        o.finish()
        return config
