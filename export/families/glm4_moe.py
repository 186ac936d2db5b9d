"""GLM-4.5 (GLM-4.5, 4.5-Air, 4.6): DeepSeek-V3's router over grouped-query attention that turns part of each head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from export.families.base import Rows, Sources
from export.families.bias_routed import BiasRoutedFamily
from export.families.options import Options
from export.families.parts import basics, grouped_query
from runtime.config import AttentionConfig, ModelConfig


class Glm4Moe(BiasRoutedFamily):
    """Checkpoints whose model_type is glm4_moe."""

    model_type = "glm4_moe"

    def parse(self, raw: dict[str, Any]) -> ModelConfig:
        """See Family.parse."""
        o = Options(raw)
        layers, context = o.size("num_hidden_layers"), o.size("max_position_embeddings")
        attention = _attention(o)
        first_dense, inner = o.size("first_k_dense_replace", least=0), o.size("moe_intermediate_size")
        config = ModelConfig(
            **basics(o),
            norm_eps=o.number("rms_norm_eps", 1e-5),
            attention=attention,
            rope=o.rope(attention.head_dim, context, partial=0.5),
            router=self.router_config(o),
            moe_layers=tuple(range(first_dense, layers)),
            expert_intermediate_size=inner,
            shared_intermediate_size=inner * o.size("n_shared_experts"),
            dense_intermediate_size=o.size("intermediate_size") if first_dense else 0,
        )
        o.size("intermediate_size", None)  # without dense layers nothing uses it
        o.finish()
        return config

    def attention(self, config: ModelConfig, at: str) -> Sources:
        """See Family.attention. The rows of q and k, their biases and norms are put in the order of `_spread`."""
        sources, a = super().attention(config, at), config.attention
        turning = config.rope.turning
        if turning is None:
            return sources
        for name in ("qkv", "qkv_bias"):
            if name in sources:
                q, k, v = sources[name]
                sources[name] = (*_spread(q, a.num_heads, turning), *_spread(k, a.num_kv_heads, turning), v)
        for name in ("q_norm", "k_norm"):
            if name in sources:
                sources[name] = _spread(sources[name][0], 1, turning)
        return sources


def _attention(o: Options) -> AttentionConfig:
    heads = o.size("num_attention_heads")
    head_dim = o.size("head_dim", o.size("hidden_size") // heads)
    return replace(
        grouped_query(heads, o.size("num_key_value_heads"), head_dim),
        qkv_bias=o.flag("attention_bias", False),  # o_proj never has one
        qk_norm="head" if o.flag("use_qk_norm", False) else "none",
    )


def _spread(whole: Rows, heads: int, turning: int) -> tuple[Rows, ...]:
    """All rows of `whole`, per head: turning first half, passing first half, turning second half, passing second half.

    A checkpoint turns the first `turning` rows of a head as one rotate-half of their own and passes the rest. In this
    order the same pairs lie half a head apart, as the runtime turns them, and those with the angle 0 pass. Queries and
    keys are re-ordered alike, so their products stay the same; a norm over the head does not mind the order.
    """
    size = whole.shape[0] // heads
    turned, passed = turning // 2, (size - turning) // 2
    parts = ((0, turned), (turning, passed), (turned, turned), (turning + passed, passed))
    return tuple(
        Rows(whole.name, whole.shape, head * size + first, count) for head in range(heads) for first, count in parts
    )
