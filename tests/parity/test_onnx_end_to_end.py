"""Checkpoint to logits and tokens through exporter, bundle, expert cache and ONNX Runtime, against transformers.

transformers computes in fp32 from weights that fp16 holds exactly. Tolerances are shares of the range of the expected
logits. fp32: 1e-5. fp16: 1e-2, twenty roundings (2^-11 each): most tokens stay below two, but ONNX Runtime's releases
round at different places, and a token whose routing hangs on that may jump.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from export.exporter import export_bundle
from runtime.engine import Engine
from runtime.options import EngineOptions, GenerateOptions
from tests.checkpoints import load_reference, make_checkpoint

pytest.importorskip("onnxruntime")
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_experts_per_tok": 4, "norm_topk_prob": False},
    "olmoe": {"clip_qkv": 2.0, "num_key_value_heads": 4, "num_experts_per_tok": 8},
    "qwen3_moe": {"tie_word_embeddings": True, "num_experts_per_tok": 1},
    "mixtral": {"num_experts_per_tok": 3},
}
TOP_K = {family: settings["num_experts_per_tok"] for family, settings in MODELS.items()}
PROMPT = torch.randint(0, 200, (45,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A bundle and its transformers model."""
    directory = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(directory / "checkpoint", request.param, **MODELS[request.param])
    export_bundle(checkpoint, directory / "bundle")
    return directory / "bundle", load_reference(checkpoint)


def open_engine(bundle: Path, dtype: str = "fp32", slots: int | None = None) -> Engine:
    return Engine.open(bundle, EngineOptions(backend="onnxruntime", dtype=dtype, slots_per_layer=slots, threads=1))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_logits(exported: tuple[Path, Any], dtype: str) -> None:
    """Logits after every token of a prompt."""
    bundle, model = exported
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0]
    with open_engine(bundle, dtype) as engine:
        found = engine.logits(PROMPT)
    errors = (found - expected).abs().amax(-1) / (expected.max() - expected.min())
    assert errors.max() < {"fp32": 1e-5, "fp16": 1e-2}[dtype]


def test_greedy_tokens_are_those_of_transformers(exported: tuple[Path, Any]) -> None:
    """64 greedy tokens, computed one by one over the growing KV cache, with the fewest slots."""
    bundle, model = exported
    expected = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
    )[0, len(PROMPT) :].tolist()
    options = GenerateOptions(max_new_tokens=64, ignore_eos=True)
    with open_engine(bundle, slots=TOP_K[model.config.model_type]) as engine:
        assert [token.id for token in engine.generate(PROMPT, options)] == expected


def test_streamed_is_resident(exported: tuple[Path, Any]) -> None:
    """The same bits with top-k slots per layer as with every expert in memory."""
    bundle, model = exported
    found = []
    for slots in (TOP_K[model.config.model_type], 1000):
        with open_engine(bundle, slots=slots) as engine:
            found.append(engine.logits(PROMPT))
    assert torch.equal(*found)
