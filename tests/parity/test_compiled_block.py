"""The compiled block of one token against fp64 and against torch's own, for every kind of grouped-query attention.

Tolerance against fp64: the kernel computes in fp32 and rounds only the new rows of the cache to fp16, relative error
2^-11 of values around 1, and the output product keeps their size; observed is below 7e-4. Torch rounds every
intermediate result to fp16, so the kernel must not be further off than that.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from runtime.backends.attention import Attention, rms_norm
from runtime.backends.block import CompiledBlock
from runtime.backends.products import Products
from runtime.config import ModelConfig
from runtime.kv_cache import KVCache
from runtime.layout import layer_tensors
from runtime.native import Kernel
from tests.kernels import LEVELS, start
from tests.parity.dense_models import MODELS, Tensors, gqa, model, reference_block

TOLERANCE = 1e-3
CAPACITY = 300
POSITIONS = [0, 1, 5, 126, 127, 128, 129, 299]  # around the kernel's chunks of 128 rows
CASES = {name: config for name, config in MODELS.items() if config.attention.kind == "gqa"} | {
    "wide values": model(gqa(10, 2, 20, v_head_dim=46)),
    "narrow values": model(gqa(4, 2, 64, v_head_dim=6), hidden_size=50),
}


def layer_weights(config: ModelConfig, generator: torch.Generator) -> Tensors:
    """Random weights of layer 0 as a torch back-end in fp16 holds them: norms in fp32."""
    weights = {}
    for name, shape in layer_tensors(config, 0).items():
        noise = torch.randn(shape, generator=generator)
        values = 1 + 0.2 * noise if name.endswith("norm") else noise / (shape[-1] ** 0.5 if len(shape) > 1 else 1)
        weights[name] = values.half().float() if name.endswith("norm") else values.half()
    return weights


def filled_cache(config: ModelConfig, generator: torch.Generator) -> KVCache:
    cache = KVCache(config, CAPACITY, torch.float16, torch.device("cpu"))
    cache.keys.copy_(torch.randn(cache.keys.shape, generator=generator))
    cache.values.copy_(torch.randn(cache.values.shape, generator=generator))
    return cache


def by_torch(config: ModelConfig, weights: Tensors, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """The residual after attention without the kernel, in fp16."""
    products = Products(torch.float16, config.activation)
    products.kernel = None
    normed = rms_norm(x, weights["attn_norm"], config.norm_eps).half()
    return torch.add(x, Attention(config, products)(weights, 0, normed, cache), alpha=config.residual_scale)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-"))
def test_agrees_with_fp64_and_torch(library: ctypes.CDLL, name: str, level: str) -> None:
    config, generator = CASES[name], torch.Generator().manual_seed(3)
    weights = layer_weights(config, generator)
    block = CompiledBlock(config, start(library, level), [weights])
    ours, theirs = [], []
    for position in POSITIONS:
        cache = filled_cache(config, generator)
        plain = KVCache(config, CAPACITY, torch.float16, torch.device("cpu"))
        plain.keys.copy_(cache.keys), plain.values.copy_(cache.values)
        cache.length = plain.length = position
        x = torch.randn(1, config.hidden_size, generator=generator)
        past = cache.keys[0, :position].clone(), cache.values[0, :position].clone()
        found, torch_found = block.run(0, x, cache), by_torch(config, weights, x, plain)
        assert found[1].dtype == torch.float16 and found[0].dtype == torch.float32
        exact = reference_block(config, weights, x.double(), past)
        ours.append(float((found[0].double() - exact[0]).abs().max()))
        theirs.append(float((torch_found.double() - exact[0]).abs().max()))
        assert torch.allclose(found[1].double(), exact[1], rtol=2**-10, atol=TOLERANCE)
        assert torch.allclose(cache.keys[0, position].double(), exact[2][0], rtol=2**-10, atol=1e-5)
        assert torch.allclose(cache.values[0, position].double(), exact[3][0], rtol=2**-10, atol=1e-5)
        assert torch.equal(cache.keys[0, :position], past[0]) and torch.equal(cache.keys[1], plain.keys[1])
        assert torch.equal(cache.keys[0, position + 1 :], plain.keys[0, position + 1 :]), "a row too many was written"
    assert max(ours) < TOLERANCE
    assert sum(ours) <= sum(theirs)


def test_threads_give_the_same_bits(library: ctypes.CDLL) -> None:
    config, generator = model(gqa(8, 4, 32), hidden_size=512), torch.Generator().manual_seed(1)
    weights, cache = layer_weights(config, generator), filled_cache(config, generator)
    cache.length, x = CAPACITY - 1, torch.randn(1, config.hidden_size, generator=generator)
    alone = CompiledBlock(config, Kernel(library, 1), [weights]).run(0, x, cache)
    several = CompiledBlock(config, Kernel(library, 3), [weights])
    for _ in range(100):
        found = several.run(0, x, cache)
        assert torch.equal(found[0], alone[0]) and torch.equal(found[1], alone[1])


def test_values_that_are_no_numbers_stay_visible(library: ctypes.CDLL) -> None:
    """An overflow must reach the sampler, which reports it, and not become a plausible number."""
    config, generator = model(gqa(4, 2)), torch.Generator().manual_seed(2)
    block = CompiledBlock(config, Kernel(library, 1), [layer_weights(config, generator)])
    for bad in (float("nan"), float("inf")):
        cache = filled_cache(config, generator)
        cache.length = 7
        cache.keys[0, 3] = bad
        out, h = block.run(0, torch.randn(1, config.hidden_size, generator=generator), cache)
        assert bool(out.isnan().all()) and bool(h.isnan().all())


def test_a_full_cache_is_refused(library: ctypes.CDLL) -> None:
    config, generator = CASES["mha"], torch.Generator().manual_seed(2)
    cache = filled_cache(config, generator)
    cache.length = CAPACITY
    block = CompiledBlock(config, Kernel(library, 1), [layer_weights(config, generator)])
    with pytest.raises(AssertionError, match="row in the cache"):
        block.run(0, torch.zeros(1, config.hidden_size), cache)
