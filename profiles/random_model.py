"""Random checkpoints in the shape of Qwen1.5-MoE, of any size: for measurements that need a model, whatever it says.

Every tensor is another window of one random buffer with a standard deviation of 0.02: quick to make, no two alike.
The embedding is 64 times that, so that a token matters more to the routers than what attention adds to all alike.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.engine import Engine, GenerateOptions
from runtime.records import TokenRecord

_BUFFER_VALUES = (1 << 24) + 1_000_003  # more than the largest tensor of a layer
_STEP = 7_368_787  # a prime: windows begin at ever new places
_STD = 0.02
_PROMPT_TOKENS = 16
_COLD_TOKENS = 4

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class SyntheticOptions:
    """The real model has 24 layers and 151,936 tokens; the rest is its shape."""

    layers: int = 4
    vocab_size: int = 32_000
    hidden_size: int = 2048
    num_experts: int = 60
    top_k: int = 4
    expert_size: int = 1408
    shared_size: int = 5632
    num_heads: int = 16
    seed: int = 0


class Windows:
    """bf16 values (as uint16) of tensors, cut from one buffer of normal values."""

    def __init__(self, seed: int, values: int = _BUFFER_VALUES) -> None:
        normal = np.random.default_rng(seed).standard_normal(values, dtype=np.float32) * _STD
        self._values = (normal.view(np.uint32) >> 16).astype(np.uint16)
        self._start = 0

    def take(self, count: int) -> npt.NDArray[np.uint16]:
        """The next window of `count` values, wrapped around as often as it takes."""
        total = len(self._values)
        self._start = (self._start + _STEP) % total
        if self._start + count <= total:
            return self._values[self._start : self._start + count]
        return np.resize(np.roll(self._values, -self._start), count)


def layer_shapes(o: SyntheticOptions, layer: int) -> Shapes:
    """Tensors of one layer under their Hugging Face names."""
    prefix, hidden = f"model.layers.{layer}.", o.hidden_size
    shapes: Shapes = {f"{prefix}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        shapes[f"{prefix}self_attn.{part}.weight"] = (hidden, hidden)
        if part != "o_proj":
            shapes[f"{prefix}self_attn.{part}.bias"] = (hidden,)
    shapes[f"{prefix}mlp.gate.weight"] = (o.num_experts, hidden)
    shapes[f"{prefix}mlp.shared_expert_gate.weight"] = (1, hidden)
    for name, inner in [("shared_expert", o.shared_size)] + [
        (f"experts.{e}", o.expert_size) for e in range(o.num_experts)
    ]:
        for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            shapes[f"{prefix}mlp.{name}.{part}_proj.weight"] = shape
    return shapes


def outer_shapes(o: SyntheticOptions) -> Shapes:
    """Embedding, last norm, head."""
    table = (o.vocab_size, o.hidden_size)
    return {"model.embed_tokens.weight": table, "model.norm.weight": (o.hidden_size,), "lm_head.weight": table}


def config_json(o: SyntheticOptions) -> dict[str, Any]:
    """config.json of the checkpoint."""
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "hidden_size": o.hidden_size,
        "intermediate_size": o.shared_size,
        "max_position_embeddings": 8192,
        "mlp_only_layers": [],
        "moe_intermediate_size": o.expert_size,
        "norm_topk_prob": False,
        "num_attention_heads": o.num_heads,
        "num_experts": o.num_experts,
        "num_experts_per_tok": o.top_k,
        "num_hidden_layers": o.layers,
        "num_key_value_heads": o.num_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "shared_expert_intermediate_size": o.shared_size,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": o.vocab_size,
    }


def tensor_values(name: str, shape: tuple[int, ...], windows: Windows) -> npt.NDArray[np.uint16]:
    """The bf16 values of a tensor, as uint16."""
    if name.endswith("norm.weight"):
        return np.full(shape, 0x3F80, np.uint16)  # 1.0 in bf16
    values = windows.take(math.prod(shape))
    return values + np.uint16(6 << 7) if name == "model.embed_tokens.weight" else values  # exponent + 6: times 64


def save_random_model(folder: Path, options: SyntheticOptions) -> None:
    """Write a small one, whole in memory, as a checkpoint of one file; `folder` must not exist. Raises OSError."""
    import torch
    from safetensors.torch import save_file

    shapes = outer_shapes(options)
    for layer in range(options.layers):
        shapes |= layer_shapes(options, layer)
    windows = Windows(options.seed)
    folder.mkdir(parents=True)
    tensors = {
        name: torch.from_numpy(tensor_values(name, shape, windows).copy()).view(torch.bfloat16).view(shape)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_json(options), indent=1) + "\n")


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    """Token ids drawn at random: a random model repeats itself less after them."""
    generator = random.Random(seed)
    return [generator.randrange(vocab_size) for _ in range(count)]


def decode_random(engine: Engine, tokens: int, seed: int) -> Iterator[TokenRecord]:
    """Records of the decode steps after a short random prompt, the first (cold) few left out, while they are made."""
    prompt = random_ids(engine.config.vocab_size, _PROMPT_TOKENS, seed)
    options = GenerateOptions(max_new_tokens=tokens, temperature=1.0, seed=seed, ignore_eos=True)
    return itertools.islice((token.record for token in engine.generate(prompt, options)), _COLD_TOKENS, None)
