"""What DeepSeek-V3 and GLM-4.5 share: sigmoid routing with a bias that only helps to choose, and a drafting layer."""

from __future__ import annotations

from collections.abc import Container

from export.families.base import Family, Rows, Sources
from export.families.latent import groups
from export.families.options import Options
from runtime.config import ModelConfig, RouterConfig


class BiasRoutedFamily(Family):
    """A family whose gate has `e_score_correction_bias`; shared experts have no gate of their own."""

    shared_at = "mlp.shared_experts"

    def router_config(self, o: Options) -> RouterConfig:
        """How the gate chooses and weights. Raises CheckpointError."""
        o.only("scoring_func", "sigmoid")
        o.only("topk_method", "noaux_tc")
        o.only("num_nextn_predict_layers", 0, 1)  # see extras
        experts, top_k = o.size("n_routed_experts"), o.size("num_experts_per_tok")
        count, top = groups(o, experts, top_k, least_members=2)
        return RouterConfig(
            num_experts=experts,
            top_k=top_k,
            scoring="sigmoid",
            normalise=o.flag("norm_topk_prob"),
            scale=o.number("routed_scaling_factor"),
            num_groups=count,
            top_groups=top,
            group_score="top2_sum",
            choice_bias=True,
        )

    def router(self, config: ModelConfig, layer: int, names: Container[str]) -> Sources:
        """See Family.router."""
        bias = Rows(f"model.layers.{layer}.mlp.gate.e_score_correction_bias", (config.router.num_experts,))
        return {**super().router(config, layer, names), f"layer_{layer:02d}.choice_bias": (bias,)}

    def extras(self, config: ModelConfig, names: Container[str]) -> dict[str, str]:
        """The layer behind the last one drafts a second token; the model's own logits do not pass through it."""
        at = f"model.layers.{config.num_layers}."
        return {at: "the multi-token prediction layer"} if at + "eh_proj.weight" in names else {}
