"""Every part of the graphs, run by the ONNX Runtime back-end, against a plain fp64 computation.

Tolerances are shares of the largest value of the expected tensor. fp32: 1e-5, some 80 roundings. fp16: 2e-3, the
rounding (2^-11) of inputs, weights' products, probabilities and outputs, four times over.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.bundle import Bundle
from runtime.kv_cache import KVCache
from runtime.layout import layer_file
from tests.parity.dense_models import (
    MODELS,
    HandMade,
    make_bundle,
    reference_block,
    reference_expert,
    reference_head,
    reference_mlp,
)

pytest.importorskip("onnxruntime")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


class Case:
    """One hand-made model with its back-end and a source of random inputs."""

    def __init__(self, made: HandMade, bundle: Bundle, dtype: torch.dtype) -> None:
        self.made, self.config, self.dtype = made, made.config, dtype
        self.backend = OnnxRuntimeBackend(bundle, dtype, threads=1)
        self._generator = torch.Generator().manual_seed(1)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def cache(self, length: int) -> KVCache:
        """A cache with `length` random rows in every layer."""
        cache = KVCache(self.config, self.config.max_context, self.dtype, torch.device("cpu"))
        for rows in (cache.keys, cache.values):
            rows[:, :length] = self.random(*rows[:, :length].shape).half()
        cache.length = length
        return cache

    def check(self, found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
        assert found.dtype == dtype
        assert found.shape == expected.shape
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[self.dtype]


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    return make_bundle(tmp_path_factory.mktemp("bundle") / request.param, MODELS[request.param])


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=["fp32", "fp16"])
def case(request: pytest.FixtureRequest, made: HandMade) -> Iterator[Case]:
    bundle = Bundle.open(made.path)
    yield Case(made, bundle, request.param)
    bundle.close()


@pytest.mark.parametrize("past", [0, 1, 7, 64])
@pytest.mark.parametrize("count", [1, 5, 37])
def test_block(case: Case, past: int, count: int) -> None:
    """Residual, normed input and the new cache rows, for every number of cached and new tokens."""
    cache, x = case.cache(past), case.random(count, case.config.hidden_size)
    rows = cache.keys[1, :past].clone(), cache.values[1, :past].clone()
    x_attn, h = case.backend.run_block(1, x, cache)

    expected = reference_block(case.config, case.made.files[layer_file(1)], x.double(), rows)
    case.check(x_attn, expected[0], torch.float32)
    case.check(h, expected[1], case.dtype)
    end = past + count
    case.check(cache.keys[1, past:end], expected[2], case.dtype)
    case.check(cache.values[1, past:end], expected[3], case.dtype)
    assert torch.equal(cache.keys[1, :past], rows[0]), "cached rows were touched"
    assert not cache.keys[0, past:].any(), "another layer was written"
    assert not cache.keys[1, end:].any(), "more rows were written than there are tokens"


def test_tokens_one_by_one_are_a_prompt(case: Case) -> None:
    """Nine tokens at once and one after the other: the same residual, so positions and masks fit together."""
    x = case.random(9, case.config.hidden_size)
    whole, _ = case.backend.run_block(0, x, case.cache(0))
    cache, single = case.cache(0), []
    for token in range(9):
        single.append(case.backend.run_block(0, x[token : token + 1], cache)[0])
        cache.advance(1)
    case.check(torch.cat(single), whole.double(), torch.float32)


@pytest.mark.parametrize("count", [1, 5, 37])
def test_mlp(case: Case, count: int) -> None:
    """Shared experts (layer 1) and the dense MLP of a layer without experts (layer 0)."""
    layers = [n for n in range(2) if case.config.mlp_size(n)]
    assert layers or case.config.shared_intermediate_size == 0
    for layer in layers:
        h = case.random(count, case.config.hidden_size).to(case.dtype)
        expected = reference_mlp(case.config, case.made.files[layer_file(layer)], h.double())
        case.check(case.backend.run_mlp(layer, h), expected, torch.float32)


@pytest.mark.parametrize("count", [1, 6])
def test_expert_from_a_slot(case: Case, count: int) -> None:
    """gate, up, down are taken from the slot in the order of the blob; nothing behind them is read."""
    shapes = case.config.expert_shapes
    blob = {name: (case.random(*shape) / shape[1] ** 0.5).half() for name, shape in shapes.items()}
    padding = torch.full((100,), torch.nan, dtype=torch.float16)
    slot = torch.cat([*(tensor.flatten() for tensor in blob.values()), padding])
    h = case.random(count, case.config.hidden_size).to(case.dtype)
    case.check(case.backend.run_expert(h, slot), reference_expert(case.config, h.double(), blob), torch.float32)


def test_massive_activations_do_not_overflow(case: Case) -> None:
    """One row whose inner values reach 200 x 200 x 7 and its output more: beyond fp16's 65,504, beside a plain row."""
    shapes = case.config.expert_shapes
    blob = {name: (case.random(*shape) / shape[1] ** 0.5).half() for name, shape in shapes.items()}
    blob["up"] *= 7
    h = case.random(2, case.config.hidden_size)
    h[0] *= 200
    h = h.to(case.dtype)
    expected = reference_expert(case.config, h.double(), blob)
    assert expected[0].abs().max() > 65_504
    found = case.backend.run_expert(h, torch.cat([tensor.flatten() for tensor in blob.values()]))
    for row in range(2):
        case.check(found[row], expected[row], torch.float32)


def test_embedding_and_head(case: Case) -> None:
    """Tied or not, with the model's scales."""
    ids = torch.tensor([3, 95, 3, 0])
    x = case.backend.embed(ids)
    expected = case.made.files["dense/embed.safetensors"]["embed"][ids].double() * case.config.embed_scale
    case.check(x, expected, torch.float32)
    x = case.random(4, case.config.hidden_size)
    case.check(case.backend.run_head(x), reference_head(case.config, case.made.files, x.double()), torch.float32)
