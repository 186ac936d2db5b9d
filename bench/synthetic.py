"""A random checkpoint of the shape of Qwen1.5-MoE-A2.7B, for speed only.

    python -m bench.synthetic out/synthetic --layers 4      1.2 GB per layer, bf16, one shard per layer

Every tensor is another window of one random buffer with a standard deviation of 0.02: quick to make, no two alike.
The embedding is 64 times that, so that a token matters more to the routers than what attention adds to all alike.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.common import GB, MB, conclude, run_main, say
from demo.stream import SafetensorsStream
from runtime.errors import EdgeError, UsageError

_BUFFER_VALUES = (1 << 24) + 1_000_003  # more than the largest tensor of a layer
_STEP = 7_368_787  # a prime: windows begin at ever new places
_STD = 0.02

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


def write_synthetic(folder: Path, options: SyntheticOptions) -> int:
    """Write the checkpoint shard by shard; returns its bytes. Raises UsageError when `folder` exists, EdgeError for a
    full disk.
    """
    shards = [layer_shapes(options, layer) for layer in range(options.layers)]
    shards.append(outer_shapes(options))
    total = sum(2 * math.prod(shape) for shard in shards for shape in shard.values())
    if folder.exists():
        raise UsageError(f"{folder} exists: remove it, or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < total * 1.02:
        raise EdgeError(
            f"{folder}: {free / GB:.1f} GB free, the checkpoint takes {total / GB:.1f} GB: use fewer --layers"
        )
    folder.mkdir()
    windows = Windows(options.seed)
    index: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shapes, windows)
        index |= dict.fromkeys(shapes, name)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    _write_json(folder / "config.json", config_json(options))
    return total


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


def _write_shard(path: Path, shapes: Shapes, windows: Windows) -> None:
    try:
        with SafetensorsStream(path, shapes, "BF16", hashed=False) as stream:
            for name, shape in shapes.items():
                stream.write(name, _values(name, shape, windows))
    except OSError as error:
        raise EdgeError(f"{path}: {error.strerror}") from None


def _values(name: str, shape: tuple[int, ...], windows: Windows) -> npt.NDArray[np.uint16]:
    if name.endswith("norm.weight"):
        return np.full(shape, 0x3F80, np.uint16)  # 1.0 in bf16
    values = windows.take(math.prod(shape))
    return values + np.uint16(6 << 7) if name == "model.embed_tokens.weight" else values  # exponent + 6: times 64


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.synthetic", description="random Qwen1.5-MoE-shaped checkpoint"
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument(
        "--layers", type=int, default=SyntheticOptions.layers, help="1.2 GB each (default: %(default)s)"
    )
    parser.add_argument("--vocab-size", type=int, default=SyntheticOptions.vocab_size, help="default: %(default)s")
    options = parser.parse_args(argv)
    settings = SyntheticOptions(layers=options.layers, vocab_size=options.vocab_size)
    return run_main(lambda: run(options.out, settings))


def run(out: Path, options: SyntheticOptions) -> None:
    """Write and say how fast it went."""
    begin = time.perf_counter()
    total = write_synthetic(out, options)
    seconds = time.perf_counter() - begin
    say(f"{out}: {options.layers} layers, {total / GB:.2f} GB in {seconds:.0f} s ({total / seconds / MB:.0f} MB/s)")
    conclude("synthetic", {"bytes": total, "seconds": seconds, "layers": options.layers})


if __name__ == "__main__":
    sys.exit(main())
