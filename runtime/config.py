"""A model in our own words: what the runtime needs to know, whatever family it came from.

Legend for shapes, used in the whole project: S tokens of this call, T tokens already in the KV cache, H hidden size,
V vocabulary, E experts of a layer, K experts per token (top-k), I intermediate size of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.errors import BundleError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding in the rotate-half convention (an exporter re-orders interleaved weights).

    `kind` "yarn" follows arXiv 2309.00071: `factor`, `original_context`, `beta_fast`, `beta_slow`; cos and sin are
    multiplied by `attention_factor`.

    `turning` values of a head turn, None: all `dim`. The others pass as they are: an exporter puts them last in each
    half of the head, where the angles are 0.
    """

    dim: int
    theta: float
    kind: Literal["default", "linear", "yarn"] = "default"
    factor: float = 1.0
    original_context: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    turning: int | None = None

    @property
    def turning_pairs(self) -> int:
        """How many of the dim / 2 pairs turn."""
        return (self.dim if self.turning is None else self.turning) // 2


@dataclass(frozen=True)
class AttentionConfig:
    """`kind` "gqa": num_heads queries share num_kv_heads keys; "mla": multi-head latent attention, whose cache holds
    one latent of kv_lora_rank values and one rope key of rope_head_dim values per token (num_kv_heads is 1).
    """

    kind: Literal["gqa", "mla"]
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of a query and key; for mla: without the rope part
    v_head_dim: int
    rope_head_dim: int  # gqa: head_dim
    scale: float  # scores are multiplied by it
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"  # RMSNorm of q and k per head, or over the whole projection
    clip_qkv: float | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    latent_norm_eps: float = 1e-6

    @property
    def cache_rows(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one token's row in the two cache buffers of a layer (keys, values; or latent, rope key)."""
        if self.kind == "mla":
            return (self.kv_lora_rank,), (self.rope_head_dim,)
        return (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.v_head_dim)


@dataclass(frozen=True)
class RouterConfig:
    """How gate logits become top-k experts and their weights; see runtime/router.py for the order of the steps."""

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = False  # divide the chosen weights by their sum (norm_topk_prob)
    scale: float = 1.0  # routed_scaling_factor
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    choice_bias: bool = False  # a bias per expert that takes part in choosing, not in weighting


@dataclass(frozen=True)
class ModelConfig:
    """One model. Layers listed in `moe_layers` have experts; the others have one dense MLP."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_context: int
    norm_eps: float
    activation: Literal["silu", "gelu", "gelu_tanh"]
    attention: AttentionConfig
    rope: RopeConfig
    router: RouterConfig
    moe_layers: tuple[int, ...]
    expert_intermediate_size: int
    shared_intermediate_size: int = 0  # 0: no shared experts
    shared_gate: bool = False  # the shared output is multiplied by sigmoid(w . h)
    dense_intermediate_size: int = 0  # of the layers without experts
    tied_embeddings: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0  # logits are multiplied by it
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def mlp_size(self, layer: int) -> int:
        """Intermediate size of the layer's dense part: its shared experts, or the whole MLP of a layer without."""
        return self.shared_intermediate_size if layer in self.moe_layers else self.dense_intermediate_size

    @property
    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """Tensors of one expert blob, in the order of their bytes: gate [I, H], up [I, H], down [H, I]."""
        hidden, inner = self.hidden_size, self.expert_intermediate_size
        return {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}

    @property
    def experts_per_token(self) -> int:
        """One token cycle: experts that a token needs over all layers."""
        return len(self.moe_layers) * self.router.top_k

    def check(self) -> None:
        """Refuse sizes that cannot belong together. Raises BundleError naming the field."""
        attention, router = self.attention, self.router
        positive = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "max_context": self.max_context,
            "expert_intermediate_size": self.expert_intermediate_size,
            "attention.num_heads": attention.num_heads,
            "attention.num_kv_heads": attention.num_kv_heads,
            "attention.head_dim": attention.head_dim,
            "attention.v_head_dim": attention.v_head_dim,
            "attention.rope_head_dim": attention.rope_head_dim,
            "router.num_experts": router.num_experts,
            "router.top_k": router.top_k,
            "router.num_groups": router.num_groups,
        }
        for name, value in positive.items():
            if not 0 < value < 1 << 31:
                raise BundleError(f"config.{name}: {value} is not between 1 and 2^31")
        sizes_or_zero = {
            "shared_intermediate_size": self.shared_intermediate_size,
            "dense_intermediate_size": self.dense_intermediate_size,
            "attention.kv_lora_rank": attention.kv_lora_rank,
            "attention.q_lora_rank": attention.q_lora_rank or 0,
        }
        for name, value in sizes_or_zero.items():
            if not 0 <= value < 1 << 31:
                raise BundleError(f"config.{name}: {value} is not between 0 and 2^31")
        rules = {
            "router.num_experts is above 2^20, where the identities of experts would repeat": router.num_experts
            <= 1 << 20,
            "attention.num_heads is no multiple of num_kv_heads": attention.num_heads % attention.num_kv_heads == 0,
            "router.top_k is greater than num_experts": router.top_k <= router.num_experts,
            "router.num_experts is no multiple of num_groups": router.num_experts % router.num_groups == 0,
            "router.top_groups is not between 1 and num_groups": 1 <= router.top_groups <= router.num_groups,
            "rope.dim differs from attention.rope_head_dim": self.rope.dim == attention.rope_head_dim,
            "rope.dim is odd": self.rope.dim % 2 == 0,
            "rope.turning is not an even number between 2 and rope.dim": self.rope.turning is None
            or (2 <= self.rope.turning <= self.rope.dim and self.rope.turning % 2 == 0),
            "norm_eps is not positive": self.norm_eps > 0,
            "rope.theta is not positive": self.rope.theta > 0,
            "moe_layers is empty": bool(self.moe_layers),
            "moe_layers is not ascending within num_layers": list(self.moe_layers)
            == sorted({n for n in self.moe_layers if 0 <= n < self.num_layers}),
            "dense_intermediate_size is 0 but some layer has no experts": self.dense_intermediate_size > 0
            or len(self.moe_layers) == self.num_layers,
        }
        for problem, holds in rules.items():
            if not holds:
                raise BundleError(f"config: {problem}")
