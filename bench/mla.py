"""Decoding with the compressed cache of latent attention against an expanded one, at DeepSeek-V2-Lite's shape.

    python -m bench.mla --context 4096 --layers 8

Both rivals have the same weights and the same history. The compressed one is the engine's attention: one latent and one
rope key per token, queries taken into the latent space. The expanded one stores keys and values per head, as a cache
for ordinary attention would; it is computed in three ways, of which the fastest counts. Only attention is timed: the
rest of a step is the same.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch.nn import functional

from bench.common import GB, MB, conclude, interleaved, run_main, say, set_threads
from profiles.bandwidth import measure_bandwidth
from runtime.backends.attention import Attention, Weights, rms_norm
from runtime.backends.products import Products
from runtime.config import AttentionConfig, ModelConfig, RopeConfig, RouterConfig
from runtime.errors import EdgeError
from runtime.kv_cache import KVCache
from runtime.layout import layer_tensors
from runtime.rope import RopeTable, rotate

DTYPE = torch.float16
_TOLERANCE = 0.02  # of the largest output: fp16 sums in another order


@dataclass(frozen=True)
class MlaOptions:
    """`context` tokens lie in the cache; the model has 27 layers, of which a few show the same."""

    context: int = 4096
    layers: int = 8
    rounds: int = 15
    threads: int | None = None


def lite(layers: int, context: int) -> ModelConfig:
    """Attention of DeepSeek-V2-Lite; what has no part in it is as small as a config may be."""
    return ModelConfig(
        family="deepseek_v2",
        vocab_size=1,
        hidden_size=2048,
        num_layers=layers,
        max_context=context,
        norm_eps=1e-6,
        activation="silu",
        attention=AttentionConfig("mla", 16, 1, 128, 128, 64, 192**-0.5, kv_lora_rank=512),
        rope=RopeConfig(64, 10000.0),
        router=RouterConfig(1, 1),
        moe_layers=(0,),
        expert_intermediate_size=1,
    )


class Compressed:
    """The engine's way: 576 values per token and layer."""

    def __init__(self, config: ModelConfig, weights: list[Weights], context: int) -> None:
        self._attention = Attention(config, Products(DTYPE, config.activation))
        self._weights = weights
        self.cache = KVCache(config, context + 1, DTYPE, torch.device("cpu"))
        self.cache.length = context
        self.cache.keys.normal_()
        self.cache.values.normal_()

    @property
    def cache_bytes(self) -> int:
        """Bytes of all layers' caches."""
        return self.cache.keys.nbytes + self.cache.values.nbytes

    def layer(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """One token h [1, H] through one layer's attention."""
        return self._attention(self._weights[layer], layer, h, self.cache)


class Expanded:
    """Keys [layers, heads, T, 192] and values [layers, heads, T, 128], made once from the same latents.

    A subclass is a way to compute attention over them.
    """

    def __init__(self, config: ModelConfig, weights: list[Weights], source: KVCache) -> None:
        self._a, self._weights, self._length = config.attention, weights, source.length
        self._products, self._rope = Products(DTYPE, config.activation), RopeTable(config.rope)
        a = config.attention
        shape = (config.num_layers, a.num_heads, source.capacity)
        self.keys = torch.zeros(*shape, a.head_dim + a.rope_head_dim, dtype=DTYPE)
        self.values = self._new_values(*shape, a.v_head_dim)
        for layer in range(config.num_layers):
            rows = slice(0, source.length)
            self._write(layer, rows, source.keys[layer, rows], source.values[layer, rows])

    @property
    def cache_bytes(self) -> int:
        """Bytes of all layers' caches."""
        return self.keys.nbytes + self.values.nbytes

    def layer(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """One token h [1, H] through one layer's attention."""
        a, weights = self._a, self._weights[layer]
        q = self._products.linear(h, weights["q"]).unflatten(-1, (a.num_heads, -1))
        plain, turned = q.split([a.head_dim, a.rope_head_dim], dim=-1)
        latent, key = self._products.linear(h, weights["kv_a"]).split([a.kv_lora_rank, a.rope_head_dim], dim=-1)
        cos, sin = self._rope.rows(self._length, 1)
        latent = rms_norm(latent, weights["kv_a_norm"], a.latent_norm_eps)
        rows = slice(self._length, self._length + 1)
        self._write(layer, rows, latent, rotate(key[:, None], cos, sin)[:, 0])
        q = torch.cat([plain, rotate(turned, cos, sin)], dim=-1).transpose(0, 1)  # [heads, 1, 192]
        mixed = self._attend(layer, q).transpose(0, 1).flatten(1)
        return self._products.linear(mixed, weights["o"])

    def _new_values(self, layers: int, heads: int, tokens: int, size: int) -> torch.Tensor:
        return torch.zeros(layers, heads, tokens, size, dtype=DTYPE)

    def _attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """One fused call of torch. q [heads, 1, 192] to [heads, 1, 128]."""
        keys, values = self.keys[layer][None], self.values[layer][None]
        return functional.scaled_dot_product_attention(q[None], keys, values, scale=self._a.scale)[0]

    def _write(self, layer: int, rows: slice, latents: torch.Tensor, rope_keys: torch.Tensor) -> None:
        weights, a = self._weights[layer], self._a
        self.keys[layer, :, rows, : a.head_dim] = torch.matmul(latents, weights["k_b"].transpose(1, 2))
        self.keys[layer, :, rows, a.head_dim :] = rope_keys
        self.values[layer, :, rows] = torch.matmul(latents, weights["v_b"].transpose(1, 2))


class ExpandedBatched(Expanded):
    """Two batched products and a softmax between them."""

    def _attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(q * self._a.scale, self.keys[layer].transpose(1, 2)).float()
        return torch.matmul(scores.softmax(-1).to(DTYPE), self.values[layer])


class ExpandedPerHead(Expanded):
    """Head by head with the engine's product of one row, for which the values of a head lie in columns [128, T]."""

    def _new_values(self, layers: int, heads: int, tokens: int, size: int) -> torch.Tensor:
        return torch.zeros(layers, heads, size, tokens, dtype=DTYPE).transpose(2, 3)

    def _attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        mixed = []
        for row, keys, values in zip(q * self._a.scale, self.keys[layer], self.values[layer], strict=True):
            shares = self._products.linear_fp32(row, keys).softmax(-1).to(DTYPE)
            mixed.append(self._products.linear(shares, values.T))
        return torch.stack(mixed)


@torch.inference_mode()
def run(options: MlaOptions) -> None:
    """Measure and print."""
    set_threads(options.threads)
    torch.manual_seed(0)
    config = lite(options.layers, options.context + 1)
    weights = [random_layer(config, layer) for layer in range(options.layers)]
    compressed = Compressed(config, weights, options.context)
    rivals: dict[str, Compressed | Expanded] = {
        "compressed": compressed,
        "expanded, fused": Expanded(config, weights, compressed.cache),
        "expanded, batched": ExpandedBatched(config, weights, compressed.cache),
        "expanded, per head": ExpandedPerHead(config, weights, compressed.cache),
    }
    h = torch.randn(1, config.hidden_size, dtype=DTYPE)
    check_equal(rivals, h, options.layers)
    times = interleaved({name: _step(rival, h, options.layers) for name, rival in rivals.items()}, options.rounds)
    bandwidth = measure_bandwidth().best
    weight_bytes = sum(tensor.nbytes for layer in weights for tensor in layer.values())
    _report(options, rivals, {n: statistics.median(t) for n, t in times.items()}, weight_bytes, bandwidth)


def _report(
    options: MlaOptions,
    rivals: dict[str, Compressed | Expanded],
    seconds: dict[str, float],
    weight_bytes: int,
    bandwidth: float,
) -> None:
    say(f"ceiling: every weight and cached row read once, {bandwidth / GB:.1f} GB/s of memory bandwidth")
    say(f"attention of {options.layers} layers, one token after {options.context}")
    rows = {}
    for name, rival in rivals.items():
        floor = (weight_bytes + rival.cache_bytes) / bandwidth
        rows[name] = {"step_s": seconds[name], "floor_s": floor, "cache_bytes": rival.cache_bytes}
        say(
            f"  {name:18}  {seconds[name] * 1e3:7.2f} ms, floor {floor * 1e3:6.2f} ms ({floor / seconds[name]:4.0%}), "
            f"cache {rival.cache_bytes / MB:7.1f} MB"
        )
    gain = min(value for name, value in seconds.items() if name != "compressed") / seconds["compressed"]
    say(f"the compressed cache is {gain:.2f} times as fast as the fastest expanded one")
    result = {"options": asdict(options), "rivals": rows, "weight_bytes": weight_bytes, "gain": gain}
    conclude("mla", {**result, "bandwidth_bytes_per_s": bandwidth})


def _step(rival: Compressed | Expanded, h: torch.Tensor, layers: int) -> Callable[[], float]:
    def run_once() -> float:
        begin = time.perf_counter()
        for layer in range(layers):
            rival.layer(layer, h)
        return time.perf_counter() - begin

    return run_once


def check_equal(rivals: dict[str, Compressed | Expanded], h: torch.Tensor, layers: int) -> None:
    """A faster wrong answer proves nothing. Raises EdgeError."""
    for layer in range(layers):
        outputs = {name: rival.layer(layer, h).float() for name, rival in rivals.items()}
        expected = outputs["compressed"]
        for name, found in outputs.items():
            error = float((found - expected).abs().max() / expected.abs().max())
            if not error < _TOLERANCE:
                raise EdgeError(f"{name}, layer {layer}: differs from the compressed cache by {error:.2%} of its range")


def random_layer(config: ModelConfig, layer: int) -> Weights:
    """Attention weights that keep the size of what passes through them."""
    shapes = layer_tensors(config, layer)
    names = ("q", "kv_a", "k_b", "v_b", "o", "kv_a_norm")
    return {name: (torch.randn(shapes[name]) / math.sqrt(shapes[name][-1])).to(DTYPE) for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.mla", description="compressed against expanded KV cache")
    for name in ("context", "layers", "rounds", "threads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(MlaOptions, name), help="default: %(default)s")
    options = MlaOptions(**vars(parser.parse_args(argv)))
    return run_main(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
