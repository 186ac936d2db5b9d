"""Published configs of DeepSeek, Moonlight and Granite in our words, and what of them is refused, by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.exporter import export_bundle
from export.families import parse_config
from export.families.deepseek_v2 import DeepseekV2
from export.settings import ExportOptions
from export.source import read_config
from runtime.config import RouterConfig
from runtime.errors import CheckpointError
from tests import published_configs as published
from tests.checkpoints import make_checkpoint, write_weights


def test_deepseek_v2_lite() -> None:
    config = parse_config(published.DEEPSEEK_V2_LITE)
    assert config.moe_layers == tuple(range(1, 27))
    assert (config.dense_intermediate_size, config.shared_intermediate_size) == (10944, 2 * 1408)
    assert not config.shared_gate
    assert config.router == RouterConfig(num_experts=64, top_k=6)
    assert config.attention.cache_rows == ((512,), (64,))  # 576 values per token and layer
    # Both mscales are equal: cos and sin keep their size, the scores are sharpened by (0.1 * 0.707 * ln 40 + 1)^2.
    assert config.rope.attention_factor == 1.0
    assert config.attention.scale == pytest.approx((0.0707 * math.log(40) + 1) ** 2 / math.sqrt(192))


def test_deepseek_v2_limits_groups() -> None:
    config = parse_config(published.DEEPSEEK_V2)
    expected = RouterConfig(160, 6, scale=16.0, num_groups=8, top_groups=3, group_score="max")
    assert config.router == expected
    assert config.attention.q_lora_rank == 1536


def test_deepseek_v3_and_moonlight_share_a_family() -> None:
    v3, moonlight = parse_config(published.DEEPSEEK_V3), parse_config(published.MOONLIGHT)
    assert v3.router == RouterConfig(256, 8, "sigmoid", True, 2.5, 8, 4, "top2_sum", choice_bias=True)
    assert moonlight.router == RouterConfig(64, 6, "sigmoid", True, 2.446, 1, 1, "top2_sum", choice_bias=True)
    # The norms of the latents keep their own epsilon, whatever rms_norm_eps is.
    assert (moonlight.norm_eps, moonlight.attention.latent_norm_eps) == (1e-5, 1e-6)
    assert moonlight.attention.scale == pytest.approx(192**-0.5)
    assert v3.moe_layers == tuple(range(3, 61))


def test_granite() -> None:
    config = parse_config(published.GRANITE_3_1B_A400M)
    assert (config.embed_scale, config.residual_scale, config.logits_scale) == (12.0, 0.22, 1 / 6)
    assert config.attention.scale == 1 / 64
    assert config.router == RouterConfig(32, 8, normalise=True)


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (published.DEEPSEEK_V2, {"topk_method": "noaux_tc"}, "topk_method"),
        (published.DEEPSEEK_V2, {"scoring_func": "sigmoid"}, "scoring_func"),
        (published.DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob"),
        (published.DEEPSEEK_V2, {"n_group": 7}, "n_group"),
        (published.DEEPSEEK_V2, {"topk_group": 9}, "topk_group"),
        (published.DEEPSEEK_V2, {"topk_group": 1, "num_experts_per_tok": 21}, "topk_group"),
        (published.DEEPSEEK_V2, {"attention_bias": True}, "attention_bias"),
        (published.DEEPSEEK_V2, {"mlp_bias": True}, "mlp_bias"),
        (published.DEEPSEEK_V2, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (published.DEEPSEEK_V2, {"num_key_value_heads": 16}, "num_key_value_heads"),
        (published.DEEPSEEK_V2, {"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope_type"),
        (published.DEEPSEEK_V2, {"sliding_window": 4096}, "sliding_window"),
        (published.DEEPSEEK_V2, {"index_topk": 2048}, "index_topk"),
        (published.DEEPSEEK_V3, {"topk_method": "greedy"}, "topk_method"),
        (published.DEEPSEEK_V3, {"rope_interleave": False}, "rope_interleave"),
        (published.DEEPSEEK_V3, {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        (published.DEEPSEEK_V3, {"n_group": 256}, "n_group"),
        (published.GRANITE_3_1B_A400M, {"sliding_window": 4096}, "sliding_window"),
        (published.GRANITE_3_1B_A400M, {"logits_scaling": 0.0}, "logits_scaling"),
        (published.GRANITE_3_1B_A400M, {"shared_intermediate_size": 1024}, "shared_intermediate_size"),
        (published.GRANITE_3_1B_A400M, {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type"),
    ],
)
def test_refused_by_name(base: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        parse_config({**base, **changes})


def test_normalising_is_dropped_for_a_single_expert() -> None:
    """DeepSeek's code divides by the sum only for top_k > 1; dividing one weight by itself would make it 1."""
    changes = {"norm_topk_prob": True, "num_experts_per_tok": 1}
    assert not parse_config({**published.DEEPSEEK_V2_LITE, **changes}).router.normalise
    assert parse_config({**published.DEEPSEEK_V2_LITE, "norm_topk_prob": True}).router.normalise


def test_fp8_checkpoints_are_refused(tmp_path: Path) -> None:
    quantised = {**published.DEEPSEEK_V3, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(CheckpointError, match=r"quantization_config \(fp8\)"):
        read_config(tmp_path)


def test_code_that_the_family_stands_for_is_no_obstacle(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(published.DEEPSEEK_V2_LITE))
    assert read_config(tmp_path)["model_type"] == "deepseek_v2"
    other = {**published.DEEPSEEK_V2_LITE, "auto_map": {"AutoModelForCausalLM": "modeling_mine.DeepseekV2ForCausalLM"}}
    file.write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="auto_map"):
        read_config(tmp_path)


def test_interleaved_rope_becomes_rotate_half() -> None:
    """Of a head of 4 plain and 6 rope rows, the rope rows come evens first: pairs (0, 1) become (0, 3) and so on."""
    tiny = {
        **published.DEEPSEEK_V2_LITE,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 6,
    }
    runs = DeepseekV2().attention(parse_config(tiny), "at.")["q"]
    rows = [row for run in runs for row in range(run.first, run.first + (run.count or 0))]
    assert rows[:10] == [0, 1, 2, 3, 4, 6, 8, 5, 7, 9]
    assert rows[10:] == [10 + row for row in rows[:10]]


def test_the_multi_token_prediction_layer_is_left_out_and_named(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "deepseek_v3", fused=True, num_nextn_predict_layers=1)
    plain = export_bundle(checkpoint, tmp_path / "plain", ExportOptions(graphs=()))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.3.mlp.gate.weight"] = torch.zeros(12, 64)
    write_weights(checkpoint, tensors)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.mlp\.gate\.weight"):  # some layer too many
        export_bundle(checkpoint, tmp_path / "refused", ExportOptions(graphs=()))
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)
    write_weights(checkpoint, tensors)
    told: list[str] = []
    with_draft = export_bundle(checkpoint, tmp_path / "draft", ExportOptions(graphs=()), note=told.append)
    assert len(told) == 1 and "multi-token prediction" in told[0]
    assert with_draft.files == plain.files
