"""DeepSeek-V2 (V2, V2.5, V2-Lite, Coder-V2): latent attention, softmax routing, greedy or limited to groups."""

from __future__ import annotations

from export.families.latent import LatentFamily, groups
from export.families.options import Options
from runtime.config import RouterConfig


class DeepseekV2(LatentFamily):
    """Checkpoints whose model_type is deepseek_v2."""

    model_type = "deepseek_v2"
    code = frozenset(
        {
            "configuration_deepseek.DeepseekV2Config",
            "modeling_deepseek.DeepseekV2Model",
            "modeling_deepseek.DeepseekV2ForCausalLM",
        }
    )

    def router_config(self, o: Options) -> RouterConfig:
        """See LatentFamily.router_config."""
        o.only("scoring_func", "softmax")
        experts, top_k = o.size("n_routed_experts"), o.size("num_experts_per_tok")
        if o.only("topk_method", "greedy", "group_limited_greedy") == "greedy":
            count, top = 1, 1
            o.integer("n_group", None)  # greedy looks at all experts, whatever these say
            o.integer("topk_group", None)
        else:
            count, top = groups(o, experts, top_k, least_members=1)
        scale = o.number("routed_scaling_factor", 1.0)
        return RouterConfig(
            num_experts=experts,
            top_k=top_k,
            normalise=_normalise(o, top_k, scale),
            scale=scale,
            num_groups=count,
            top_groups=top,
            group_score="max",
        )


def _normalise(o: Options, top_k: int, scale: float) -> bool:
    """norm_topk_prob as DeepSeek's own code has it: for more than one expert, and then in place of the scaling factor.

    transformers 5.23 reads the option and ignores it. vLLM normalises and scales: where that would differ, there is no
    telling which of them the weights were trained for. No published checkpoint sets it.
    """
    wanted = bool(o.flag("norm_topk_prob", False))
    if wanted and scale != 1.0:
        o.refuse("norm_topk_prob", True, f"with routed_scaling_factor = {scale:g}: implementations disagree about it")
    return wanted and top_k > 1
