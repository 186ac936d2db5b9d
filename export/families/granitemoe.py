"""GraniteMoE (Granite 3.x 1b-a400m and 3b-a800m, PowerMoE): Mixtral with four multipliers and stacked experts."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any

from export.families.base import Family, Rows, Sources, cut_out
from export.families.options import Options
from export.families.parts import basics, grouped_query
from runtime.config import ModelConfig, RouterConfig


class GraniteMoe(Family):
    """Checkpoints whose model_type is granitemoe."""

    model_type = "granitemoe"
    moe = "block_sparse_moe"

    def parse(self, raw: dict[str, Any]) -> ModelConfig:
        """See Family.parse."""
        o = Options(raw)
        hidden, heads, layers = o.size("hidden_size"), o.size("num_attention_heads"), o.size("num_hidden_layers")
        context = o.size("max_position_embeddings")
        head_dim = o.size("head_dim", hidden // heads)
        bias = o.flag("attention_bias", False)
        o.full_attention(True, context)
        config = ModelConfig(
            **basics(o),
            norm_eps=o.number("rms_norm_eps", 1e-6),
            attention=replace(
                grouped_query(heads, o.size("num_key_value_heads", heads), head_dim),
                scale=o.number("attention_multiplier", 1.0),  # in place of 1 / sqrt(head_dim)
                qkv_bias=bias,
                o_bias=bias,
            ),
            rope=o.rope(head_dim, context),
            # A softmax over the best k logits is the softmax over all of them, normalised over these k.
            router=RouterConfig(num_experts=o.experts(), top_k=o.size("num_experts_per_tok"), normalise=True),
            moe_layers=tuple(range(layers)),
            expert_intermediate_size=o.size("intermediate_size"),
            embed_scale=o.number("embedding_multiplier", 1.0),
            residual_scale=o.number("residual_multiplier", 1.0),
            logits_scale=1.0 / o.positive("logits_scaling", 1.0),
        )
        o.finish()
        return config

    def router(self, config: ModelConfig, layer: int, names: Container[str]) -> Sources:
        """See Family.router."""
        at = f"model.layers.{layer}.{self.moe}.router."
        name = at + ("layer.weight" if at + "layer.weight" in names else "weight")  # the hub; transformers 5 in memory
        return {f"layer_{layer:02d}.weight": (Rows(name, (config.router.num_experts, config.hidden_size)),)}

    def expert(self, config: ModelConfig, layer: int, expert: int, names: Container[str]) -> tuple[Rows, ...]:
        """See Family.expert: both spellings have stacked tensors."""
        at = f"model.layers.{layer}.{self.moe}."
        if at + "input_linear.weight" in names:
            return cut_out(config, expert, at + "input_linear.weight", at + "output_linear.weight")
        return cut_out(config, expert, at + "experts.gate_up_proj", at + "experts.down_proj")
