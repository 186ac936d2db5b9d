"""The dense block of one token in one call of the compiled kernel, for grouped-query attention in fp16.

The same function as TorchBackend's own block, which stays the definition: here nothing between x and h is rounded to
fp16 except what goes into the cache, there every intermediate result is. Shapes: H hidden size.
"""

from __future__ import annotations

import ctypes
import math

import torch

from runtime.config import ModelConfig
from runtime.kv_cache import KVCache
from runtime.native import Block, Kernel, Step
from runtime.rope import RopeTable

Weights = dict[str, torch.Tensor]
_FP32 = ("attn_norm", "ffn_norm", "q_norm", "k_norm", "qkv_bias", "o_bias")  # small, so the kernel takes them in fp32


class CompiledBlock:
    """Every layer's weights as the kernel wants them."""

    def __init__(self, config: ModelConfig, kernel: Kernel, layers: list[Weights]) -> None:
        """`layers`: weights as in layout.layer_tensors, matrices in fp16. They are kept, not copied."""
        self._kernel = kernel
        self._rope = RopeTable(config.rope)
        self._hidden = config.hidden_size
        self._tensors = [_prepared(weights) for weights in layers]
        self._blocks = [_block(config, tensors) for tensors in self._tensors]
        self._scratch = torch.empty(0)

    def run(self, layer: int, x: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """x [1, H] fp32 at position cache.length to the residual after attention [1, H] fp32 and h [1, H] fp16; writes
        the token's rows into `cache`, which is fp16.
        """
        position = cache.length
        assert position < cache.capacity and x.shape == (1, self._hidden), "one token, and a row in the cache for it"
        x, (cos, sin) = x.contiguous(), self._rope.rows(position, 1)
        out, h = torch.empty_like(x), torch.empty(1, self._hidden, dtype=torch.float16)
        block = self._blocks[layer]
        rows = (cache.keys[layer], cache.values[layer])
        pointers = [tensor.data_ptr() for tensor in (x, cos, sin, *rows)]
        step = Step(*pointers, position, self._room(block, cache), out.data_ptr(), h.data_ptr())
        self._kernel.block(block, step)
        return out, h

    def _room(self, block: Block, cache: KVCache) -> int:
        """Address of scratch for any position of the cache."""
        floats = self._kernel.block_scratch(block, cache.capacity - 1)
        if len(self._scratch) < floats:
            self._scratch = torch.empty(floats)
        return self._scratch.data_ptr()


def suits(config: ModelConfig) -> bool:
    """Whether the kernel has this model's attention."""
    return config.attention.kind == "gqa"


def _prepared(weights: Weights) -> Weights:
    matrices = {name: weights[name] for name in ("qkv", "o")}
    return matrices | {name: weights[name].float() for name in _FP32 if name in weights}


def _block(config: ModelConfig, tensors: Weights) -> Block:
    a = config.attention
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    return Block(
        **{name: ctypes.c_void_p(tensor.data_ptr()) for name, tensor in tensors.items()},
        hidden=config.hidden_size,
        heads=a.num_heads,
        kv_heads=a.num_kv_heads,
        head_size=a.head_dim,
        value_size=a.v_head_dim,
        norm_whole=a.qk_norm == "full",
        norm_eps=config.norm_eps,
        clip=math.inf if a.clip_qkv is None else a.clip_qkv,
        scale=a.scale,
        residual_scale=config.residual_scale,
    )
