"""The Qwen2-MoE layout that both demo models are written in: names, shapes, config.json, and what is not an expert.

Shapes: V vocabulary, H hidden, E experts, M neurons of an expert, S neurons of the shared expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from demo.source import LAYER_NAMES, DenseConfig, DenseSource, TokenizerData

Half = npt.NDArray[np.float16]

# Of the shared gate's weights, whose sigmoid is then 1/2 to fp32's last digit; llama.cpp would make NaN of exactly 0.
_TINY = float(np.finfo(np.float16).smallest_subnormal)
_ATTENTION = [name for name in LAYER_NAMES if name.startswith("self_attn.")]


@dataclass(frozen=True)
class Layout:
    """Sizes of a mixture; `normalised`: the weights of the top_k chosen experts are made to sum to 1."""

    dense: DenseConfig
    num_experts: int
    expert_size: int
    shared_size: int
    top_k: int
    normalised: bool

    def plan(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the checkpoint, in file order."""
        c = self.dense
        plan: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
        for layer in range(c.num_layers):
            prefix = f"model.layers.{layer}."
            plan |= {f"{prefix}{name}": size for name, size in _attention_shapes(c).items()}
            plan[f"{prefix}mlp.gate.weight"] = (self.num_experts, c.hidden_size)
            plan[f"{prefix}mlp.shared_expert_gate.weight"] = (1, c.hidden_size)
            plan |= _mlp_shapes(f"{prefix}mlp.shared_expert.", self.shared_size, c.hidden_size)
            for expert in range(self.num_experts):
                plan |= _mlp_shapes(f"{prefix}mlp.experts.{expert}.", self.expert_size, c.hidden_size)
        plan["model.norm.weight"] = (c.hidden_size,)
        return plan

    def config(self, data: TokenizerData) -> dict[str, Any]:
        """config.json. Both spellings of rope and dtype: transformers 4 and 5 read one each."""
        c = self.dense
        return {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "attention_dropout": 0.0,
            "bos_token_id": data.bos_id,
            "decoder_sparse_step": 1,
            "dtype": "float16",
            "eos_token_id": data.eos_id,
            "hidden_act": "silu",
            "hidden_size": c.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": c.intermediate_size,
            "max_position_embeddings": c.max_context,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.expert_size,
            "norm_topk_prob": self.normalised,
            "num_attention_heads": c.num_heads,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": c.num_layers,
            "num_key_value_heads": c.num_kv_heads,
            "output_router_logits": False,
            "pad_token_id": data.padding_id,
            "qkv_bias": True,
            "rms_norm_eps": c.norm_eps,
            "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
            "rope_theta": c.rope_theta,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": self.shared_size,
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": c.vocab_size,
        }


def dense_tensors(source: DenseSource, layer: int, gate: Half) -> Iterator[tuple[str, Half]]:
    """Norms and attention of a layer, its router `gate` [E, H] and the gate of the shared expert, in file order."""
    prefix = f"model.layers.{layer}."
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", to_half(source.layer(layer, name))
    for name in _ATTENTION:
        weight = to_half(source.layer(layer, name))
        yield f"{prefix}{name}.weight", weight
        if name != "self_attn.o_proj":
            yield f"{prefix}{name}.bias", np.zeros(len(weight), np.float16)
    yield f"{prefix}mlp.gate.weight", gate
    yield f"{prefix}mlp.shared_expert_gate.weight", _shared_gate(layer, source.config.hidden_size)


def to_half(values: npt.NDArray[Any]) -> Half:
    """Round to nearest even."""
    return values.astype(np.float16)


def _attention_shapes(c: DenseConfig) -> dict[str, tuple[int, ...]]:
    head = c.hidden_size // c.num_heads
    rows = {"q": c.num_heads * head, "k": c.num_kv_heads * head, "v": c.num_kv_heads * head}
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (c.hidden_size,),
        "post_attention_layernorm.weight": (c.hidden_size,),
    }
    for part, size in rows.items():
        shapes[f"self_attn.{part}_proj.weight"] = (size, c.hidden_size)
        shapes[f"self_attn.{part}_proj.bias"] = (size,)
    shapes["self_attn.o_proj.weight"] = (c.hidden_size, c.num_heads * head)
    return shapes


def _mlp_shapes(prefix: str, inner: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {f"{prefix}{part}_proj.weight": size for part, size in shapes.items()}


def _shared_gate(layer: int, hidden: int) -> Half:
    # RandomState: the one numpy stream that is promised to stay the same in every release
    signs = np.random.RandomState(layer).random_sample((1, hidden)) < 0.5
    return np.where(signs, np.float16(_TINY), np.float16(-_TINY))
