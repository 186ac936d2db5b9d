"""DeepSeek-V3 (V3, R1, Moonlight): latent attention, sigmoid routing with a bias that only helps to choose."""

from __future__ import annotations

from export.families.bias_routed import BiasRoutedFamily
from export.families.latent import LatentFamily
from export.families.options import Options
from runtime.config import RouterConfig


class DeepseekV3(BiasRoutedFamily, LatentFamily):
    """Checkpoints whose model_type is deepseek_v3."""

    model_type = "deepseek_v3"
    code = frozenset(
        {
            "configuration_deepseek.DeepseekV3Config",
            "modeling_deepseek.DeepseekV3Model",
            "modeling_deepseek.DeepseekV3ForCausalLM",
        }
    )

    def router_config(self, o: Options) -> RouterConfig:
        """See LatentFamily.router_config."""
        o.only("rope_interleave", True)
        return super().router_config(o)
