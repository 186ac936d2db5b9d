"""Attention without a concatenated cache: scores over past and over new rows are two products under one softmax.

Both forms return (mixed values [S, heads * v_head_dim], first and second new cache rows), all in the compute dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from export.graph import FP16, FP32, Graph
from export.maths import linear, rms_norm, rope, scaled, stored
from runtime.config import ModelConfig

_TO_THE_END = np.iinfo(np.int32).max


class Inputs(NamedTuple):
    """What attention reads: normed tokens h [S, H] in the compute dtype and the block's inputs of the same names."""

    h: str
    cos: str
    sin: str
    mask: str
    past_k: str
    past_v: str


def gqa(g: Graph, config: ModelConfig, file: str, at: Inputs) -> tuple[str, str, str]:
    """Grouped-query attention over past_k and past_v [T, kv heads, D]."""
    a = config.attention
    heads, groups, size = a.num_kv_heads, a.num_heads // a.num_kv_heads, a.head_dim
    widths = (a.num_heads * size, heads * size, heads * a.v_head_dim)
    bias = "qkv_bias" if a.qkv_bias else None
    qkv = linear(g, at.h, file, "qkv", (sum(widths), config.hidden_size), bias)
    q, k, v = g.ops("Split", 3, qkv, g.const(widths), axis=1)

    cos, sin = (g.op("Unsqueeze", table, g.const([1])) for table in (at.cos, at.sin))
    q = rope(g, _heads(g, config, file, q, "q_norm", a.num_heads), cos, sin, size)
    k = rope(g, _heads(g, config, file, k, "k_norm", heads), cos, sin, size)
    # The scale goes to q, before fp16: scores of large biased keys would overflow it.
    q = g.cast(scaled(g, q, a.scale), g.compute)
    k_new = g.cast(k, g.compute)
    v_new = g.op("Reshape", _clipped(g, v, a.clip_qkv, g.compute), g.const([-1, heads, a.v_head_dim]))

    q = g.op("Reshape", q, g.const([-1, heads, groups, size]))
    q = g.op("Reshape", g.op("Transpose", q, perm=[1, 2, 0, 3]), g.const([heads, -1, size]))  # [kv heads, G*S, D]
    past, new = (g.op("MatMul", q, g.op("Transpose", k, perm=[1, 2, 0])) for k in (at.past_k, k_new))
    past, new = softmax(g, past, new, at.mask, groups, at.past_k)
    past, new = (g.op("MatMul", p, g.op("Transpose", v, perm=[1, 0, 2])) for p, v in ((past, at.past_v), (new, v_new)))
    mixed = g.op("Reshape", g.op("Add", past, new), g.const([heads, groups, -1, a.v_head_dim]))
    mixed = g.op("Transpose", mixed, perm=[2, 0, 1, 3])
    return g.op("Reshape", mixed, g.const([-1, a.num_heads * a.v_head_dim])), k_new, v_new


def mla(g: Graph, config: ModelConfig, file: str, at: Inputs) -> tuple[str, str, str]:
    """Multi-head latent attention in absorbed form over latents past_k [T, rank] and rope keys past_v [T, rope dim].

    Queries go to the latent space through k_b, so keys and values per head are never built: scores and mixture are
    taken over the latents, and v_b leads the mixture back to the heads.
    """
    a = config.attention
    heads, rank, turned = a.num_heads, a.kv_lora_rank, a.rope_head_dim
    q = g.op("Reshape", _mla_query(g, config, file, at.h), g.const([-1, heads, a.head_dim + turned]))
    q_plain, q_turned = g.ops("Split", 2, q, g.const([a.head_dim, turned]), axis=2)
    kv = linear(g, at.h, file, "kv_a", (rank + turned, config.hidden_size))
    latent, k_turned = g.ops("Split", 2, g.cast(kv, FP32), g.const([rank, turned]), axis=1)

    k_new = g.cast(rms_norm(g, latent, file, "kv_a_norm", rank, a.latent_norm_eps), g.compute)
    v_new = g.cast(rope(g, k_turned, at.cos, at.sin, turned), g.compute)
    cos, sin = (g.op("Unsqueeze", table, g.const([1])) for table in (at.cos, at.sin))
    q_turned = scaled(g, rope(g, g.cast(q_turned, FP32), cos, sin, turned), a.scale)
    q_plain = g.cast(scaled(g, g.cast(q_plain, FP32), a.scale), g.compute)

    k_b = stored(g, file, "k_b", (heads, a.head_dim, rank), g.compute)
    q_latent = g.op("MatMul", g.op("Transpose", q_plain, perm=[1, 0, 2]), k_b)  # [heads, S, rank]
    q_latent = g.op("Reshape", q_latent, g.const([-1, rank]))
    q_turned = g.op("Transpose", g.cast(q_turned, g.compute), perm=[1, 0, 2])
    q_turned = g.op("Reshape", q_turned, g.const([-1, turned]))
    past, new = (
        _latent_scores(g, q_latent, q_turned, latents, keys)
        for latents, keys in ((at.past_k, at.past_v), (k_new, v_new))
    )
    past, new = softmax(g, past, new, at.mask, heads, at.past_k)
    mixed = g.op("Add", g.op("MatMul", past, at.past_k), g.op("MatMul", new, k_new))
    mixed = g.op("Reshape", mixed, g.const([heads, -1, rank]))
    v_b = stored(g, file, "v_b", (heads, a.v_head_dim, rank), g.compute)
    mixed = g.op("MatMul", mixed, g.op("Transpose", v_b, perm=[0, 2, 1]))  # [heads, S, D]
    mixed = g.op("Reshape", g.op("Transpose", mixed, perm=[1, 0, 2]), g.const([-1, heads * a.v_head_dim]))
    return mixed, k_new, v_new


def softmax(g: Graph, past: str, new: str, mask: str, copies: int, past_rows: str) -> tuple[str, str]:
    """Weights over past [.., rows, T] and new [.., rows, S] scores, from one fp32 softmax over both.

    rows = copies * S, so mask [S, T + S] is laid `copies` times below itself; past_rows [T, ...] tells T.
    """
    scores = g.op("Concat", g.cast(past, FP32), g.cast(new, FP32), axis=-1)
    scores = g.op("Add", scores, g.op("Tile", mask, g.const([copies, 1])))
    weights = g.cast(g.op("Softmax", scores, axis=-1), g.compute)
    tokens = g.op("Slice", g.op("Shape", past_rows), g.const([0]), g.const([1]), g.const([0]))
    last = g.const([-1])
    first = g.op("Slice", weights, g.const([0]), tokens, last)
    return first, g.op("Slice", weights, tokens, g.const([_TO_THE_END]), last)


def _heads(g: Graph, config: ModelConfig, file: str, x: str, norm: str, heads: int) -> str:
    """Projected queries or keys as fp32 [S, heads, D]; a norm of the whole projection comes before the clip (OLMoE)."""
    a, eps = config.attention, config.norm_eps
    x = g.cast(x, FP32)
    if a.qk_norm == "full":
        x = rms_norm(g, x, file, norm, heads * a.head_dim, eps)
    x = g.op("Reshape", _clipped(g, x, a.clip_qkv, FP32), g.const([-1, heads, a.head_dim]))
    return rms_norm(g, x, file, norm, a.head_dim, eps) if a.qk_norm == "head" else x


def _clipped(g: Graph, x: str, limit: float | None, dtype: int) -> str:
    if limit is None:
        return x
    kind = np.float16 if dtype == FP16 else np.float32
    return g.op("Clip", x, g.const(-limit, kind), g.const(limit, kind))


def _mla_query(g: Graph, config: ModelConfig, file: str, h: str) -> str:
    a, hidden = config.attention, config.hidden_size
    width = a.num_heads * (a.head_dim + a.rope_head_dim)
    if a.q_lora_rank is None:
        return linear(g, h, file, "q", (width, hidden))
    low = g.cast(linear(g, h, file, "q_a", (a.q_lora_rank, hidden)), FP32)
    low = g.cast(rms_norm(g, low, file, "q_a_norm", a.q_lora_rank, a.latent_norm_eps), g.compute)
    return linear(g, low, file, "q_b", (width, a.q_lora_rank))


def _latent_scores(g: Graph, q_latent: str, q_turned: str, latents: str, keys: str) -> str:
    """[heads * S, tokens] scores against cached rows: latent part plus rope part."""
    by_latent = g.op("MatMul", q_latent, g.op("Transpose", latents, perm=[1, 0]))
    return g.op("Add", by_latent, g.op("MatMul", q_turned, g.op("Transpose", keys, perm=[1, 0])))
