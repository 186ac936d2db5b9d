"""The dense llama as plain functions over its tensors: faster on a CPU than transformers, for training and for writing.

Shapes: B rows, S tokens, H hidden, N query heads, K key heads, D head size, I inner size, V vocabulary. All float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from demo.source import DenseConfig, DenseSource

Rope = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """Weights of one layer: `qkv` [(N + 2K) D, H], `out` [H, N D], `gate_up` [2 I, H], `down` [H, I], norms [H]."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Network:
    """The whole dense model: `embedding` [V, H] is the head as well."""

    config: DenseConfig
    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor

    @classmethod
    def load(cls, source: DenseSource) -> Network:
        """Every tensor of the GGUF file, dequantised."""
        layers = tuple(_load_layer(source, number) for number in range(source.config.num_layers))
        embedding, norm = (torch.from_numpy(a.copy()) for a in (source.embedding(), source.final_norm()))
        return cls(source.config, embedding, layers, norm)

    def rope(self, positions: torch.Tensor) -> Rope:
        """cos and sin [S, D] of the positions [S]."""
        size = self.config.hidden_size // self.config.num_heads
        frequencies = self.config.rope_theta ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()

    def normalise(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm over the last dimension."""
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)

    def project(self, layer: Layer, x: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, S, H] to q [B, N, S, D], k and v [B, K, S, D], after the norm and the rotation."""
        c = self.config
        size = c.hidden_size // c.num_heads
        heads = F.linear(self.normalise(x, layer.attention_norm), layer.qkv).unflatten(-1, (-1, size)).transpose(1, 2)
        q, k, v = heads.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        return _rotate(q, rope), _rotate(k, rope), v

    def attention(self, layer: Layer, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """x [B, S, H] after causal attention within the rows, residual included."""
        q, k, v = self.project(layer, x, rope)
        share = self.config.num_heads // self.config.num_kv_heads
        k, v = (t.repeat_interleave(share, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + F.linear(mixed.transpose(1, 2).flatten(2), layer.out)

    def mlp(self, layer: Layer, h: torch.Tensor) -> torch.Tensor:
        """The dense feed-forward part of normed input h [..., H], without the residual."""
        gate, up = F.linear(h, layer.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer.down)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Last hidden states [..., H] to logits [..., V]."""
        return F.linear(self.normalise(x, self.norm), self.embedding)


def _load_layer(source: DenseSource, number: int) -> Layer:
    def fused(*names: str) -> torch.Tensor:
        return torch.cat([torch.from_numpy(source.layer(number, name).copy()) for name in names])

    return Layer(
        attention_norm=fused("input_layernorm"),
        qkv=fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out=fused("self_attn.o_proj"),
        mlp_norm=fused("post_attention_layernorm"),
        gate_up=fused("mlp.gate_proj", "mlp.up_proj"),
        down=fused("mlp.down_proj"),
    )


def _rotate(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat([-high, low], dim=-1) * rope[1]
