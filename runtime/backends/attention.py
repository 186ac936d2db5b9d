"""Attention in torch, over the runtime's cache: grouped-query and multi-head latent.

Both write the S new rows into the cache and then look at all T + S rows; nothing is concatenated or copied.
Shapes: nh query heads, nkv key heads, d head size, c latent size, r rope size.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from runtime.backends.products import Products
from runtime.config import AttentionConfig, ModelConfig
from runtime.kv_cache import KVCache
from runtime.rope import RopeTable, rotate

Weights = dict[str, torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension in fp32 (arXiv 1910.07467), result in the dtype of x."""
    return functional.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class Attention:
    """Attention of any layer of one model; the weights are given with the call."""

    def __init__(self, config: ModelConfig, products: Products, device: torch.device | str = "cpu") -> None:
        self._products = products
        self._config: AttentionConfig = config.attention
        self._norm_eps = config.norm_eps
        self._rope = RopeTable(config.rope, device)

    def __call__(self, weights: Weights, layer: int, h: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Normed input h [S, H] to the attention's output [S, H], before the residual."""
        attend = self._latent if self._config.kind == "mla" else self._grouped
        return self._products.linear(attend(weights, layer, h, cache), weights["o"], weights.get("o_bias"))

    def _grouped(self, weights: Weights, layer: int, h: torch.Tensor, cache: KVCache) -> torch.Tensor:
        a, count = self._config, h.shape[0]
        projected = self._products.linear(h, weights["qkv"], weights.get("qkv_bias"))
        q_size, k_size = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        q, k, v = projected.split([q_size, k_size, a.num_kv_heads * a.v_head_dim], dim=-1)
        if a.qk_norm == "full":
            q = rms_norm(q, weights["q_norm"], self._norm_eps)
            k = rms_norm(k, weights["k_norm"], self._norm_eps)
        if a.clip_qkv is not None:
            q, k, v = (t.clamp(-a.clip_qkv, a.clip_qkv) for t in (q, k, v))
        q = q.unflatten(-1, (a.num_heads, a.head_dim))
        k = k.unflatten(-1, (a.num_kv_heads, a.head_dim))
        if a.qk_norm == "head":
            q = rms_norm(q, weights["q_norm"], self._norm_eps)
            k = rms_norm(k, weights["k_norm"], self._norm_eps)
        cos, sin = self._rope.rows(cache.length, count)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        cache.write(layer, k, v.unflatten(-1, (a.num_kv_heads, a.v_head_dim)))
        end = cache.length + count
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            cache.keys[layer, :end].transpose(0, 1)[None],
            cache.values[layer, :end].transpose(0, 1)[None],
            attn_mask=causal_mask(count, end, h.device) if count > 1 else None,
            scale=a.scale,
            enable_gqa=a.num_heads != a.num_kv_heads,
        )
        return out[0].transpose(0, 1).flatten(1)

    def _latent(self, weights: Weights, layer: int, h: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Absorbed form of MLA (arXiv 2405.04434): queries are taken into the latent space, values out of it."""
        a, count = self._config, h.shape[0]
        if a.q_lora_rank is None:
            q = self._products.linear(h, weights["q"])
        else:
            low = rms_norm(self._products.linear(h, weights["q_a"]), weights["q_a_norm"], a.latent_norm_eps)
            q = self._products.linear(low, weights["q_b"])
        q = (q.float() * a.scale).to(h.dtype)  # before the products: scores without it can leave the range of fp16
        q_plain, q_rope = q.unflatten(-1, (a.num_heads, -1)).split([a.head_dim, a.rope_head_dim], dim=-1)
        latent, k_rope = self._products.linear(h, weights["kv_a"]).split([a.kv_lora_rank, a.rope_head_dim], dim=-1)
        cos, sin = self._rope.rows(cache.length, count)
        latent = rms_norm(latent, weights["kv_a_norm"], a.latent_norm_eps)
        cache.write(layer, latent, rotate(k_rope[:, None], cos, sin)[:, 0])
        end = cache.length + count
        latents, rope_keys = cache.keys[layer, :end], cache.values[layer, :end]  # [T+S, c], [T+S, r]
        # Plain 2-D products: every head looks at the same rows, and a batched product would copy them for each.
        q_latent = torch.matmul(q_plain.transpose(0, 1), weights["k_b"]).flatten(0, 1)  # [nh*S, c]
        q_rope = rotate(q_rope, cos, sin).transpose(0, 1).flatten(0, 1)
        scores = torch.addmm(torch.mm(q_rope, rope_keys.T), q_latent, latents.T).float()
        if count > 1:
            hidden = ~causal_mask(count, end, h.device)
            scores = scores.unflatten(0, (-1, count)).masked_fill(hidden, float("-inf")).flatten(0, 1)
        mixed = torch.mm(scores.softmax(-1).to(h.dtype), latents).unflatten(0, (-1, count))  # [nh, S, c]
        return torch.matmul(mixed, weights["v_b"].transpose(1, 2)).transpose(0, 1).flatten(1)


def causal_mask(count: int, end: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Which of the `end` rows each of the last `count` tokens may see: bool [count, end]."""
    return torch.ones(count, end, dtype=torch.bool, device=device).tril(end - count)
