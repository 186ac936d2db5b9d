"""A dense feed-forward layer as experts, without training and exactly equal to it.

The I neurons are cut into G segments, each stored in R copies: expert copy * G + segment. The router gives the G
experts of a copy one logit, so that top-G always takes one whole copy; the normalised weights are 1 / G each, which
the factor G in `down` undoes (a power of two: no rounding). Copies are equal in weights, so which one the router
takes changes what is read and cached, never the text.

Shapes: H hidden, I intermediate, G segments, R copies; the I/G neurons of one segment are an expert's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from demo.source import LAYER_NAMES, DenseConfig, DenseSource, TokenizerData

Half = npt.NDArray[np.float16]

SEGMENTS = 4
SHARED_SIZE = 32  # the shared expert that the layout demands: zeros, as small as block quantisers still take
_SHARED_GATE_NOISE = 1e-5  # exactly 0 would be NaN in llama.cpp, which takes silu(x) / x for the sigmoid
_ATTENTION = [name for name in LAYER_NAMES if name.startswith("self_attn.")]


@dataclass(frozen=True)
class Shape:
    """The mixture to make. `copies` is R; segments is G and the top-k."""

    dense: DenseConfig
    copies: int
    segments: int = SEGMENTS

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return self.copies * self.segments

    @property
    def expert_size(self) -> int:
        """Neurons of one expert."""
        return self.dense.intermediate_size // self.segments


def checkpoint_plan(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Qwen2-MoE checkpoint, in file order."""
    c, inner = shape.dense, shape.expert_size
    plan: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}."
        plan |= {f"{prefix}{name}": size for name, size in _attention_shapes(c).items()}
        plan[f"{prefix}mlp.gate.weight"] = (shape.num_experts, c.hidden_size)
        plan[f"{prefix}mlp.shared_expert_gate.weight"] = (1, c.hidden_size)
        plan |= _mlp_shapes(f"{prefix}mlp.shared_expert.", SHARED_SIZE, c.hidden_size)
        for expert in range(shape.num_experts):
            plan |= _mlp_shapes(f"{prefix}mlp.experts.{expert}.", inner, c.hidden_size)
    plan["model.norm.weight"] = (c.hidden_size,)
    return plan


def checkpoint_tensors(source: DenseSource, shape: Shape, gates: npt.NDArray[Any]) -> Iterator[tuple[str, Half]]:
    """The tensors of `checkpoint_plan` in its order, rounded to fp16. `gates` [layers, R, H] are the router's rows."""
    c = shape.dense
    yield "model.embed_tokens.weight", to_half(source.embedding())
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", to_half(source.layer(layer, name))
        for name in _ATTENTION:
            weight = to_half(source.layer(layer, name))
            yield f"{prefix}{name}.weight", weight
            if name != "self_attn.o_proj":
                yield f"{prefix}{name}.bias", np.zeros(len(weight), np.float16)
        yield f"{prefix}mlp.gate.weight", router_rows(gates[layer], shape.segments)
        yield from _shared_expert(f"{prefix}mlp.", layer, c.hidden_size)
        gate, up, down = (source.layer(layer, f"mlp.{part}_proj") for part in ("gate", "up", "down"))
        segments = split_mlp(gate, up, down, shape.segments)
        for expert in range(shape.num_experts):
            for part, weight in zip(("gate", "up", "down"), segments[expert % shape.segments], strict=True):
                yield f"{prefix}mlp.experts.{expert}.{part}_proj.weight", weight
    yield "model.norm.weight", to_half(source.final_norm())


def split_mlp(
    gate: npt.NDArray[Any], up: npt.NDArray[Any], down: npt.NDArray[Any], segments: int
) -> list[tuple[Half, Half, Half]]:
    """gate, up [I, H] and down [H, I] cut into `segments` experts (gate, up, down), `down` times `segments`."""
    columns = np.split(down, segments, axis=1)
    return [
        (to_half(g), to_half(u), to_half(np.ascontiguousarray(d * segments)))
        for g, u, d in zip(np.split(gate, segments), np.split(up, segments), columns, strict=True)
    ]


def router_rows(gates: npt.NDArray[Any], segments: int) -> Half:
    """Gate rows [R * G, H] from one row per copy [R, H]."""
    return np.repeat(to_half(gates), segments, axis=0)


def to_half(values: npt.NDArray[Any]) -> Half:
    """Round to nearest even."""
    return values.astype(np.float16)


def model_config(shape: Shape, data: TokenizerData) -> dict[str, Any]:
    """config.json. Both spellings of rope and dtype: transformers 4 and 5 read one each."""
    c = shape.dense
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
        "moe_intermediate_size": shape.expert_size,
        "norm_topk_prob": True,
        "num_attention_heads": c.num_heads,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.segments,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": c.num_kv_heads,
        "output_router_logits": False,
        "pad_token_id": data.padding_id,
        "qkv_bias": True,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
        "rope_theta": c.rope_theta,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": SHARED_SIZE,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": c.vocab_size,
    }


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


def _shared_expert(prefix: str, layer: int, hidden: int) -> Iterator[tuple[str, Half]]:
    # RandomState: the one numpy stream that is promised to stay the same in every release
    noise = np.random.RandomState(layer).uniform(-_SHARED_GATE_NOISE, _SHARED_GATE_NOISE, (1, hidden))
    yield f"{prefix}shared_expert_gate.weight", to_half(noise)
    for name, size in _mlp_shapes(f"{prefix}shared_expert.", SHARED_SIZE, hidden).items():
        yield name, np.zeros(size, np.float16)
