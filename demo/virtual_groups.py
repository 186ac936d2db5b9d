"""A dense feed-forward layer as experts, without training and equal to it but for rounding.

The neurons are cut into G segments, each stored in R copies: expert copy * G + segment. The router gives the G
experts of a copy one logit, so that top-G always takes one whole copy; the normalised weights are 1 / G each, which
the factor G in `down` undoes (a power of two: no rounding). Copies are equal in weights, so which one the router
takes changes what is read and cached, never the text.

A few neurons of SmolLM2 answer the first token with values near 25,000, and G times that is more than fp16 holds. So
the L loudest neurons of a layer stand in every segment with their own `down` (their G shares of 1 / G make the whole);
the (G - 1) * L next loudest give up their places for it and become the shared expert, whose gate is 1/2.

Shapes: H hidden, I intermediate, G segments, R copies; an expert has I/G neurons.
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
LOUD = 32  # neurons per layer that stand in every segment
# Of the shared gate's weights, whose sigmoid is then 1/2 to fp32's last digit; llama.cpp would make NaN of exactly 0.
_TINY = float(np.finfo(np.float16).smallest_subnormal)
_ATTENTION = [name for name in LAYER_NAMES if name.startswith("self_attn.")]


@dataclass(frozen=True)
class Shape:
    """The mixture to make: R copies, G segments (and the top-k), L loud neurons."""

    dense: DenseConfig
    copies: int
    segments: int = SEGMENTS
    loud: int = LOUD

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return self.copies * self.segments

    @property
    def expert_size(self) -> int:
        """Neurons of one expert."""
        return self.dense.intermediate_size // self.segments

    @property
    def shared_size(self) -> int:
        """Neurons of the shared expert."""
        return (self.segments - 1) * self.loud


@dataclass(frozen=True)
class Routing:
    """What calibration adds per layer: `gates` [layers, R, H], and `order` [layers, G * L], the loudest neurons."""

    gates: npt.NDArray[np.float16]
    order: npt.NDArray[np.int16]

    @property
    def copies(self) -> int:
        """R."""
        return int(self.gates.shape[1])

    @property
    def loud(self) -> int:
        """L."""
        return int(self.order.shape[1]) // SEGMENTS


def checkpoint_plan(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Qwen2-MoE checkpoint, in file order."""
    c, inner = shape.dense, shape.expert_size
    plan: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}."
        plan |= {f"{prefix}{name}": size for name, size in _attention_shapes(c).items()}
        plan[f"{prefix}mlp.gate.weight"] = (shape.num_experts, c.hidden_size)
        plan[f"{prefix}mlp.shared_expert_gate.weight"] = (1, c.hidden_size)
        plan |= _mlp_shapes(f"{prefix}mlp.shared_expert.", shape.shared_size, c.hidden_size)
        for expert in range(shape.num_experts):
            plan |= _mlp_shapes(f"{prefix}mlp.experts.{expert}.", inner, c.hidden_size)
    plan["model.norm.weight"] = (c.hidden_size,)
    return plan


def checkpoint_tensors(source: DenseSource, shape: Shape, routing: Routing) -> Iterator[tuple[str, Half]]:
    """The tensors of `checkpoint_plan` in its order, rounded to fp16."""
    yield "model.embed_tokens.weight", to_half(source.embedding())
    for layer in range(shape.dense.num_layers):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", to_half(source.layer(layer, name))
        for name in _ATTENTION:
            weight = to_half(source.layer(layer, name))
            yield f"{prefix}{name}.weight", weight
            if name != "self_attn.o_proj":
                yield f"{prefix}{name}.bias", np.zeros(len(weight), np.float16)
        yield f"{prefix}mlp.gate.weight", np.repeat(to_half(routing.gates[layer]), shape.segments, axis=0)
        yield f"{prefix}mlp.shared_expert_gate.weight", _shared_gate(layer, shape.dense.hidden_size)
        yield from _mlp_tensors(source, shape, layer, routing.order[layer])
    yield "model.norm.weight", to_half(source.final_norm())


def _mlp_tensors(
    source: DenseSource, shape: Shape, layer: int, order: npt.NDArray[np.int16]
) -> Iterator[tuple[str, Half]]:
    gate, up, down = (to_half(source.layer(layer, f"mlp.{part}_proj")) for part in ("gate", "up", "down"))
    shared, *segments = split_mlp(gate, up, down, shape.segments, order)
    experts = [(f"experts.{e}", segments[e % shape.segments]) for e in range(shape.num_experts)]
    for name, weights in [("shared_expert", shared), *experts]:
        for part, weight in zip(("gate", "up", "down"), weights, strict=True):
            yield f"model.layers.{layer}.mlp.{name}.{part}_proj.weight", weight


def split_mlp(
    gate: Half, up: Half, down: Half, segments: int, order: npt.NDArray[np.int16]
) -> list[tuple[Half, Half, Half]]:
    """gate, up [I, H] and down [H, I] as (gate, up, down) of the shared expert, then of each segment.

    `order` names the G * L loudest neurons, the loudest first.
    """
    loud, shared = np.split(order, [len(order) // segments])
    others = np.delete(np.arange(len(gate)), order)
    parts = [(gate[shared], up[shared], down[:, shared] * np.float16(2))]  # the gate's 1/2
    for own in np.split(others, segments):
        neurons = np.concatenate([own, loud])
        factor = np.repeat(np.array([segments, 1], np.float16), [len(own), len(loud)])
        parts.append((gate[neurons], up[neurons], down[:, neurons] * factor))
    return parts


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
        "shared_expert_intermediate_size": shape.shared_size,
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


def _shared_gate(layer: int, hidden: int) -> Half:
    # RandomState: the one numpy stream that is promised to stay the same in every release
    signs = np.random.RandomState(layer).random_sample((1, hidden)) < 0.5
    return np.where(signs, np.float16(_TINY), np.float16(-_TINY))
