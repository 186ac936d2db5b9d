"""What back-ends that compute with torch share: weights on their device, the dense parts, and experts from their slots.

On the CPU these are the definition that every other back-end is compared with.
"""

from __future__ import annotations

import torch

from runtime.backends.attention import Attention, rms_norm
from runtime.backends.products import Products
from runtime.bundle import Bundle
from runtime.config import ModelConfig
from runtime.dense import load_tensors
from runtime.kv_cache import KVCache
from runtime.layout import HEAD_FILE, head_tensors, layer_file, layer_tensors

Shapes = dict[str, tuple[int, ...]]


def load_weights(
    bundle: Bundle, file: str, shapes: Shapes, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Weights of one dense file in the compute dtype; those of norms in fp32, in which norms are computed."""
    return {
        name: values.to(device, torch.float32 if name.endswith("norm") else dtype)
        for name, values in load_tensors(bundle, file, shapes).items()
    }


class TorchDense:
    """Blocks, MLPs and head of one model; the verbs of Backend that have their names."""

    def __init__(
        self, bundle: Bundle, products: Products, dtype: torch.dtype, device: torch.device, embed: torch.Tensor
    ) -> None:
        """`embed`: the embedding table in `dtype` on `device`, which is the head of a model with tied embeddings."""
        config = self._config = bundle.config
        self._products, self._dtype = products, dtype
        head = load_weights(bundle, HEAD_FILE, head_tensors(config), dtype, device)
        self._norm, self._head = head["norm"], head.get("head", embed)
        #: Weights of every layer, as in layout.layer_tensors.
        self.layers = [
            load_weights(bundle, layer_file(layer), layer_tensors(config, layer), dtype, device)
            for layer in range(config.num_layers)
        ]
        self._attention = Attention(config, products, device)

    def run_block(self, layer: int, x: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """See Backend.run_block."""
        weights, config = self.layers[layer], self._config
        normed = rms_norm(x, weights["attn_norm"], config.norm_eps).to(self._dtype)
        attended = self._attention(weights, layer, normed, cache)
        x = torch.add(x, attended, alpha=config.residual_scale)
        return x, rms_norm(x, weights["ffn_norm"], config.norm_eps).to(self._dtype)

    def run_mlp(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """See Backend.run_mlp."""
        weights = self.layers[layer]
        out = self._products.gated(h, weights["mlp.gate_up"], weights["mlp.down"])
        if "mlp.router" in weights:
            out = out * self._products.linear_fp32(h, weights["mlp.router"]).sigmoid()
        return out

    def run_head(self, x: torch.Tensor) -> torch.Tensor:
        """See Backend.run_head."""
        normed = rms_norm(x, self._norm, self._config.norm_eps).to(self._dtype)
        return self._products.linear_fp32(normed, self._head) * self._config.logits_scale


class TorchExpert:
    """Any expert of one model, from its blob's values in the compute dtype: gate, up, down."""

    def __init__(self, config: ModelConfig, products: Products) -> None:
        self.inner = inner = config.expert_intermediate_size
        hidden = config.hidden_size
        self.values = 3 * inner * hidden
        self._split = 2 * inner * hidden
        self._gate_up_shape, self._down_shape = (2 * inner, hidden), (hidden, inner)
        self._products = products

    def run(self, h: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """h [n, H] and `values` (1-D) to [n, H] fp32."""
        gate_up, down = values[: self._split], values[self._split :]
        return self._products.gated(h, gate_up.view(self._gate_up_shape), down.view(self._down_shape))
