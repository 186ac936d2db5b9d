"""What the DeepSeek families share: multi-head latent attention, first layers dense, shared experts without a gate.

The checkpoint's attention is re-arranged for the absorbed form in which the runtime computes it (arXiv 2405.04434):
kv_b_proj is cut into the keys' and the values' half, and interleaved rope becomes rotate-half by re-ordering rows.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from export.families.base import Family, Rows, Sources
from export.families.options import HARMLESS, Options, mscale
from export.families.parts import basics
from runtime.config import AttentionConfig, ModelConfig, RopeConfig, RouterConfig

# Losses and parallelism of the training; head_dim and qk_head_dim, which transformers derives whatever the file says.
_HARMLESS = HARMLESS | {"aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "head_dim", "qk_head_dim", "auto_map"}
# Both classes build the norms of the latents with their default, whatever rms_norm_eps is.
_LATENT_NORM_EPS = 1e-6


class LatentFamily(Family):
    """A family with multi-head latent attention; what differs is the router."""

    shared_at = "mlp.shared_experts"

    @abstractmethod
    def router_config(self, o: Options) -> RouterConfig:
        """How the gate of this family chooses and weights. Raises CheckpointError."""

    def parse(self, raw: dict[str, Any]) -> ModelConfig:
        """See Family.parse."""
        o = Options(raw, _HARMLESS)
        layers, context = o.size("num_hidden_layers"), o.size("max_position_embeddings")
        first_dense, inner = o.size("first_k_dense_replace", least=0), o.size("moe_intermediate_size")
        rope = o.rope(o.size("qk_rope_head_dim"), context)
        o.only("moe_layer_freq", 1)
        o.only("mlp_bias", False)
        config = ModelConfig(
            **basics(o),
            norm_eps=o.number("rms_norm_eps", 1e-6),
            attention=_attention(o, rope),
            rope=rope,
            router=self.router_config(o),
            moe_layers=tuple(range(first_dense, layers)),
            expert_intermediate_size=inner,
            shared_intermediate_size=inner * o.size("n_shared_experts", 0, least=0),
            dense_intermediate_size=o.size("intermediate_size") if first_dense else 0,
        )
        o.size("intermediate_size", None)  # without dense layers nothing uses it
        o.finish()
        return config

    def attention(self, config: ModelConfig, at: str) -> Sources:
        """See Family.attention."""
        a, hidden, rank = config.attention, config.hidden_size, config.attention.kv_lora_rank
        q_rows, kv_rows = a.head_dim + a.rope_head_dim, a.head_dim + a.v_head_dim
        sources: Sources = {}
        q_name, q_columns = "q_proj", hidden
        if a.q_lora_rank is not None:
            q_name, q_columns = "q_b_proj", a.q_lora_rank
            sources["q_a"] = (Rows(at + "q_a_proj.weight", (a.q_lora_rank, hidden)),)
            sources["q_a_norm"] = (Rows(at + "q_a_layernorm.weight", (a.q_lora_rank,)),)
        q_name, q_shape = f"{at}{q_name}.weight", (a.num_heads * q_rows, q_columns)
        sources["q" if a.q_lora_rank is None else "q_b"] = tuple(
            run
            for first in range(0, a.num_heads * q_rows, q_rows)
            for run in _plain_then_rope(q_name, q_shape, first, a.head_dim, a.rope_head_dim)
        )
        kv_a = _plain_then_rope(
            at + "kv_a_proj_with_mqa.weight", (rank + a.rope_head_dim, hidden), 0, rank, a.rope_head_dim
        )
        sources["kv_a"] = kv_a
        sources["kv_a_norm"] = (Rows(at + "kv_a_layernorm.weight", (rank,)),)
        kv_b, kv_shape = at + "kv_b_proj.weight", (a.num_heads * kv_rows, rank)
        heads = range(0, a.num_heads * kv_rows, kv_rows)
        sources["k_b"] = tuple(Rows(kv_b, kv_shape, first, a.head_dim) for first in heads)
        sources["v_b"] = tuple(Rows(kv_b, kv_shape, first + a.head_dim, a.v_head_dim) for first in heads)
        sources["o"] = (Rows(at + "o_proj.weight", (hidden, a.num_heads * a.v_head_dim)),)
        return sources


def groups(o: Options, experts: int, top_k: int, least_members: int) -> tuple[int, int]:
    """n_group and topk_group, refused where the top-k experts would not fit into the chosen groups."""
    count, top = o.size("n_group"), o.size("topk_group")
    if experts % count or experts // count < (least_members if count > 1 else 1):
        o.refuse("n_group", count, f"does not divide {experts} experts into groups of {least_members} or more")
    if top > count or top_k > top * (experts // count):
        o.refuse("topk_group", top, f"of {count} groups leaves too few experts for num_experts_per_tok = {top_k}")
    return count, top


def _attention(o: Options, rope: RopeConfig) -> AttentionConfig:
    heads, plain = o.size("num_attention_heads"), o.size("qk_nope_head_dim")
    o.only("attention_bias", False)
    if o.size("num_key_value_heads", heads) != heads:
        o.refuse("num_key_value_heads", o.size("num_key_value_heads"), f"differs from num_attention_heads = {heads}")
    # A stretched rope also sharpens the scores; unlike the attention factor this holds for the part without rope too.
    all_dim = o.rope_number("mscale_all_dim") if rope.kind != "default" else None
    sharper = mscale(rope.factor, all_dim) ** 2 if all_dim else 1.0
    return AttentionConfig(
        kind="mla",
        num_heads=heads,
        num_kv_heads=1,
        head_dim=plain,
        v_head_dim=o.size("v_head_dim"),
        rope_head_dim=rope.dim,
        scale=(plain + rope.dim) ** -0.5 * sharper,
        q_lora_rank=o.size("q_lora_rank", None),
        kv_lora_rank=o.size("kv_lora_rank"),
        latent_norm_eps=_LATENT_NORM_EPS,
    )


def _plain_then_rope(name: str, shape: tuple[int, ...], first: int, plain: int, rope: int) -> tuple[Rows, ...]:
    """`plain` rows as they are, then `rope` rows in the order 0, 2, 4, ..., 1, 3, 5, ...

    Interleaved rope turns rows 2i and 2i + 1 as a pair, rotate-half turns i and i + rope / 2. Queries and keys are
    re-ordered alike, so their products stay the same.
    """
    start = first + plain
    order = [*range(start, start + rope, 2), *range(start + 1, start + rope, 2)]
    return Rows(name, shape, first, plain), *(Rows(name, shape, row, 1) for row in order)
