"""GLM-4.5 in our words: the published config, the order of a head's rows, and every refusal by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from export.exporter import export_bundle
from export.families import parse_config
from export.families.base import Rows
from export.families.glm4_moe import Glm4Moe
from export.settings import ExportOptions
from runtime.config import RopeConfig, RouterConfig
from runtime.errors import CheckpointError
from tests import published_configs as published
from tests.checkpoints import make_checkpoint, write_weights

AIR = published.GLM_4_5_AIR
GLM_4_5: dict[str, Any] = {
    **AIR,
    "first_k_dense_replace": 3,
    "hidden_size": 5120,
    "n_routed_experts": 160,
    "num_hidden_layers": 92,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}


def test_glm_4_5_air() -> None:
    config = parse_config(AIR)
    a = config.attention
    assert config.rope == RopeConfig(128, 1e6, turning=64)
    assert (a.num_heads, a.num_kv_heads, a.head_dim, a.scale) == (96, 8, 128, 128**-0.5)
    assert (a.qkv_bias, a.o_bias, a.qk_norm) == (True, False, "none")
    assert config.router == RouterConfig(128, 8, "sigmoid", True, 1.0, 1, 1, "top2_sum", choice_bias=True)
    assert config.moe_layers == tuple(range(1, 46))
    assert (config.dense_intermediate_size, config.shared_intermediate_size, config.shared_gate) == (10944, 1408, False)
    assert (config.norm_eps, config.eos_token_ids) == (1e-5, (151329, 151336, 151338))


def test_glm_4_5() -> None:
    config = parse_config(GLM_4_5)
    assert (config.attention.qk_norm, config.router.scale, config.router.num_experts) == ("head", 2.5, 160)
    assert config.moe_layers == tuple(range(3, 92))


def test_every_spelling_of_the_part_that_turns() -> None:
    """Top level on the hub, inside the rope's settings in transformers 5, which win; half is transformers' default."""
    plain = {name: value for name, value in AIR.items() if name not in ("partial_rotary_factor", "rope_scaling")}
    assert parse_config(plain) == parse_config(AIR)
    spellings: dict[int | None, dict[str, Any]] = {
        32: {"partial_rotary_factor": 0.25},
        96: {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.75}},
        16: {"partial_rotary_factor": 0.25, "rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.125}},
        None: {"partial_rotary_factor": 1},
    }
    for turning, given in spellings.items():
        assert parse_config({**plain, **given}).rope == RopeConfig(128, 1e6, turning=turning)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
        ({"partial_rotary_factor": -0.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor"),  # 51 of 128
        ({"partial_rotary_factor": float("inf")}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, "rope_type"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 128}, "n_group"),
        ({"n_group": 4, "topk_group": 5}, "topk_group"),
        ({"n_group": 32, "topk_group": 1}, "topk_group"),  # 4 experts left for a top-8
        ({"n_shared_experts": 0}, "n_shared_experts"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        ({"num_key_value_heads": 7}, "num_kv_heads"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"hidden_act": "relu2"}, "hidden_act"),
        ({"use_qk_norm": "head"}, "use_qk_norm"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        parse_config({**AIR, **changes})


def test_rows_of_a_head_that_half_turns() -> None:
    """Of 8 rows the first 4 turn, as pairs (0, 2) and (1, 3): in the bundle pairs lie 4 rows apart."""
    tiny = {**AIR, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "use_qk_norm": True}
    sources = Glm4Moe().attention(parse_config(tiny), "at.")
    head = [0, 1, 4, 5, 2, 3, 6, 7]
    for name in ("qkv", "qkv_bias"):
        *runs, v = sources[name]
        kind = "weight" if name == "qkv" else "bias"
        assert _rows(runs, f"at.q_proj.{kind}") == [8 * n + row for n in range(4) for row in head]
        assert _rows(runs, f"at.k_proj.{kind}") == [8 * n + row for n in range(2) for row in head]
        assert v == Rows(f"at.v_proj.{kind}", (16, 4096) if kind == "weight" else (16,))
    for name in ("q_norm", "k_norm"):
        assert _rows([*sources[name]], f"at.{name}.weight") == head


def test_the_multi_token_prediction_layer_is_left_out_and_named(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "glm4_moe", fused=True)
    plain = export_bundle(checkpoint, tmp_path / "plain", ExportOptions(graphs=()))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.3.shared_head.norm.weight"] = torch.ones(64)
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)
    write_weights(checkpoint, tensors)
    told: list[str] = []
    with_draft = export_bundle(checkpoint, tmp_path / "draft", ExportOptions(graphs=()), note=told.append)
    assert len(told) == 1 and "multi-token prediction" in told[0]
    assert with_draft.files == plain.files


def _rows(runs: list[Rows], name: str) -> list[int]:
    return [row for run in runs if run.name == name for row in range(run.first, run.first + (run.count or 0))]
