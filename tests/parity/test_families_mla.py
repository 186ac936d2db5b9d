"""DeepSeek-V2, DeepSeek-V3 and GraniteMoE against transformers, every option switched both ways, on both back-ends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from export.exporter import export_bundle
from runtime.engine import Engine, EngineOptions
from tests.checkpoints import load_reference, make_checkpoint
from tests.parity.agreement import PROMPT, assert_agrees, bundle_and_reference

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
_PLAIN = {"rope_type": "default", "rope_theta": 50000.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # The Lite shape in small: yarn with both mscales, one dense layer, two shared experts, greedy, no query latent.
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2 fused": ("deepseek_v2", {"fused": True}),
    "deepseek_v2 query latent": ("deepseek_v2", {"q_lora_rank": 20, "rms_norm_eps": 0.05}),
    "deepseek_v2 group limited, scaled": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5},
    ),
    "deepseek_v2 all layers with experts": ("deepseek_v2", {"first_k_dense_replace": 0, "n_shared_experts": 1}),
    "deepseek_v2 two dense layers": ("deepseek_v2", {"first_k_dense_replace": 2}),
    "deepseek_v2 plain rope": ("deepseek_v2", {"rope_parameters": _PLAIN, "tie_word_embeddings": True}),
    "deepseek_v2 linear rope": (
        "deepseek_v2",
        {"rope_parameters": {**_PLAIN, "rope_type": "linear", "factor": 4.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek_v2 unequal mscales": (
        "deepseek_v2",
        {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "deepseek_v2 no mscale": ("deepseek_v2", {"rope_parameters": _YARN}),
    "deepseek_v2 top-1": ("deepseek_v2", {"num_experts_per_tok": 1}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3 fused": ("deepseek_v3", {"fused": True}),
    "deepseek_v3 query latent, yarn": (
        "deepseek_v3",
        {"q_lora_rank": 20, "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    # Moonlight: one group, another rms_norm_eps, plain rope.
    "deepseek_v3 one group": (
        "deepseek_v3",
        {"n_group": 1, "topk_group": 1, "rms_norm_eps": 0.05, "routed_scaling_factor": 2.446},
    ),
    "deepseek_v3 not normalised": ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    "deepseek_v3 all groups": ("deepseek_v3", {"topk_group": 4, "first_k_dense_replace": 0}),
    "granitemoe": ("granitemoe", {}),
    "granitemoe fused": ("granitemoe", {"fused": True, "tie_word_embeddings": True}),
    "granitemoe without multipliers": (
        "granitemoe",
        {
            "embedding_multiplier": 1.0,
            "attention_multiplier": 0.25,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
            "attention_bias": True,
        },
    ),
    "granitemoe top-1": ("granitemoe", {"num_experts_per_tok": 1}),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    family, overrides = CASES[request.param]
    return bundle_and_reference(tmp_path_factory.mktemp("model"), family, **overrides)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_agrees_with_transformers(model: tuple[Path, Any], backend: Any) -> None:
    bundle, reference = model
    assert_agrees(bundle, reference, backend)


def test_deepseek_v2_normalises_as_its_authors_do(tmp_path: Path) -> None:
    """transformers 5.23 reads norm_topk_prob of DeepSeek-V2 and ignores it; DeepSeek's own code divides by the sum."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "deepseek_v2", norm_topk_prob=True)
    export_bundle(checkpoint, tmp_path / "bundle")
    reference = load_reference(checkpoint)

    def divide(module: Any, inputs: Any, output: Any) -> Any:
        logits, weights, experts = output
        return logits, weights / weights.sum(dim=-1, keepdim=True), experts

    gates = [layer.mlp.gate for layer in reference.model.layers[1:]]
    for gate in gates:
        gate.register_forward_hook(divide)
    assert_agrees(tmp_path / "bundle", reference, "torch")


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "granitemoe"])
def test_low_precision_stays_close(tmp_path: Path, family: str) -> None:
    """As for the other families: most tokens within 1 % of the logit range in fp16, on either back-end."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, num_experts_per_tok=2)
    export_bundle(checkpoint, tmp_path / "bundle")
    with torch.inference_mode():
        expected = load_reference(checkpoint)(torch.tensor([PROMPT])).logits[0]
    scale = float(expected.max() - expected.min())
    for backend in ("torch", "onnxruntime"):
        with Engine.open(
            tmp_path / "bundle", EngineOptions(backend=backend, dtype="fp16", slots_per_layer=2)
        ) as engine:  # type: ignore[arg-type]
            found = engine.logits(PROMPT)
        assert float((found - expected).abs().max(dim=-1).values.median()) < 0.01 * scale, backend
        assert bool(torch.isfinite(found).all())


@torch.inference_mode()
def test_the_cases_reach_both_sides_of_the_group_limit(tmp_path: Path) -> None:
    """A group limit that never excluded a wanted expert would prove nothing: here it must change some choices."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "deepseek_v3")
    reference = load_reference(checkpoint)
    gate = reference.model.layers[1].mlp.gate
    h = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    limited = gate(h)[2].sort(-1).values
    free = ((h @ gate.weight.T).sigmoid() + gate.e_score_correction_bias).topk(3).indices.sort(-1).values
    changed = (limited != free).any(-1).float().mean()
    assert 0.05 < float(changed) < 0.95
    assert math.isclose(float(gate(h)[1].sum(-1).mean()), 2.5, rel_tol=1e-5)
