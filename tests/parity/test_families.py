"""The Qwen families, OLMoE and Mixtral against transformers in fp32, for both back-ends; tolerance in agreement.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from export.exporter import export_bundle
from runtime.engine import Engine, EngineOptions
from tests.checkpoints import load_reference, make_checkpoint
from tests.parity.agreement import PROMPT, assert_agrees, bundle_and_reference

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe top-1 of 5": ("qwen2_moe", {"num_experts_per_tok": 1, "num_experts": 5}),
    "qwen2_moe top-4 of 60, normalised": (
        "qwen2_moe",
        {"num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": True, "moe_intermediate_size": 24},
    ),
    "qwen2_moe top-8 of 13": ("qwen2_moe", {"num_experts_per_tok": 8, "num_experts": 13}),
    "qwen2_moe without attention bias": ("qwen2_moe", {"qkv_bias": False}),
    "qwen2_moe tied": ("qwen2_moe", {"tie_word_embeddings": True}),
    "qwen2_moe no GQA": ("qwen2_moe", {"num_key_value_heads": 4}),
    "qwen2_moe one key head": ("qwen2_moe", {"num_key_value_heads": 1}),
    "qwen2_moe with dense layers": ("qwen2_moe", {"mlp_only_layers": [1]}),
    "qwen2_moe sparse step": ("qwen2_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "olmoe": ("olmoe", {}),
    "olmoe top-1": ("olmoe", {"num_experts_per_tok": 1}),
    "olmoe top-8 of 11, normalised": (
        "olmoe",
        {"num_experts_per_tok": 8, "num_experts": 11, "norm_topk_prob": True},
    ),
    "olmoe with attention bias": ("olmoe", {"attention_bias": True}),
    "olmoe clipped": ("olmoe", {"clip_qkv": 0.5}),
    "olmoe tied": ("olmoe", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe not normalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe with attention bias": ("qwen3_moe", {"attention_bias": True}),
    "mixtral": ("mixtral", {"num_experts_per_tok": 2}),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    family, overrides = CASES[request.param]
    return bundle_and_reference(tmp_path_factory.mktemp("model"), family, **overrides)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_agrees_with_transformers(model: tuple[Path, Any], backend: Any) -> None:
    bundle, reference = model
    assert_agrees(bundle, reference, backend)


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe"])
def test_low_precision_stays_close(tmp_path: Path, family: str, fused: bool) -> None:
    """fp16 has 11 significant bits and bf16 has 8: with fp32 residual, norms, softmax and sums the error of these small
    models stays within 1 % and 6 % of the logit range when the routing is the same, which large gates ensure.
    """
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, fused=fused, num_experts_per_tok=2)
    export_bundle(checkpoint, tmp_path / "bundle")
    with torch.inference_mode():
        expected = load_reference(checkpoint)(torch.tensor([PROMPT])).logits[0]
    scale = float(expected.max() - expected.min())
    for dtype, tolerance in (("fp16", 0.01), ("bf16", 0.06)):
        with Engine.open(tmp_path / "bundle", EngineOptions(dtype=dtype, slots_per_layer=2)) as engine:  # type: ignore[arg-type]
            found = engine.logits(PROMPT)
        error = (found - expected).abs().max(dim=-1).values / scale
        # A router margin below the rounding may still send a token elsewhere: most tokens must agree, all be finite.
        assert float(error.median()) < tolerance, dtype
        assert bool(torch.isfinite(found).all())
