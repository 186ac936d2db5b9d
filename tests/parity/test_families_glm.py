"""GLM-4.5 against transformers, every option switched both ways, on both back-ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from export.exporter import export_bundle
from runtime.engine import Engine, EngineOptions
from tests.checkpoints import load_reference, make_checkpoint
from tests.parity.agreement import PROMPT, assert_agrees, bundle_and_reference


def _rope(kind: str, partial: float, **more: float) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, "partial_rotary_factor": partial, **more}


# As it stands: biased q, k and v of 24 values per head, of which 12 turn; 2 of 4 groups; one dense layer.
CASES: dict[str, dict[str, Any]] = {
    "as it stands": {},
    "fused": {"fused": True},
    "norm of q and k": {"use_qk_norm": True, "rms_norm_eps": 0.05},
    "norm without bias": {"use_qk_norm": True, "attention_bias": False, "rope_parameters": _rope("default", 0.25)},
    "neither norm nor bias": {"attention_bias": False},
    "most of the head turns": {"rope_parameters": _rope("default", 0.75), "num_key_value_heads": 4},
    "the whole head turns": {"rope_parameters": _rope("default", 1.0), "use_qk_norm": True},
    # What passes must not be multiplied by yarn's attention factor of 1.21.
    "yarn": {"rope_parameters": _rope("yarn", 0.5, factor=8.0, original_max_position_embeddings=32)},
    "linear rope, one key head": {"rope_parameters": _rope("linear", 0.5, factor=4.0), "num_key_value_heads": 1},
    "one group, not normalised": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "all layers with experts, two shared": {"first_k_dense_replace": 0, "n_shared_experts": 2},
    "two dense layers, tied, top-1": {
        "first_k_dense_replace": 2,
        "tie_word_embeddings": True,
        "num_experts_per_tok": 1,
    },
}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return bundle_and_reference(tmp_path_factory.mktemp("model"), "glm4_moe", **CASES[request.param])


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_agrees_with_transformers(model: tuple[Path, Any], backend: Any) -> None:
    bundle, reference = model
    assert_agrees(bundle, reference, backend)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_low_precision_stays_close(tmp_path: Path, backend: Any) -> None:
    """As for the other families: most tokens within 1 % of the logit range in fp16."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "glm4_moe", num_experts_per_tok=2, use_qk_norm=True)
    export_bundle(checkpoint, tmp_path / "bundle")
    with torch.inference_mode():
        expected = load_reference(checkpoint)(torch.tensor([PROMPT])).logits[0]
    options = EngineOptions(backend=backend, dtype="fp16", slots_per_layer=2)
    with Engine.open(tmp_path / "bundle", options) as engine:
        found = engine.logits(PROMPT)
    scale = float(expected.max() - expected.min())
    assert float((found - expected).abs().max(dim=-1).values.median()) < 0.01 * scale
    assert bool(torch.isfinite(found).all())
