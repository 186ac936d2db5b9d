"""config.json of every family: the published files parse, whatever could change the arithmetic is refused by name."""

import json
import math
from typing import Any

import pytest

from export.families import families, family_of, parse_config, read_model
from runtime.config import RopeConfig
from runtime.errors import CheckpointError

QWEN15_MOE: dict[str, Any] = json.loads("""
{"architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1,
 "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
 "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21, "model_type": "qwen2_moe",
 "moe_intermediate_size": 1408, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts": 60,
 "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": false,
 "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
 "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": false,
 "torch_dtype": "bfloat16", "transformers_version": "4.39.0.dev0", "use_cache": true, "use_sliding_window": false,
 "vocab_size": 151936}""")
OLMOE: dict[str, Any] = json.loads("""
{"architectures": ["OlmoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "clip_qkv": null,
 "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
 "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": false,
 "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
 "num_key_value_heads": 16, "output_router_logits": false, "pad_token_id": 1, "rms_norm_eps": 1e-05,
 "rope_scaling": null, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": false,
 "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": true, "vocab_size": 50304}""")
QWEN3_30B: dict[str, Any] = json.loads("""
{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
 "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
 "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
 "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
 "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
 "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null,
 "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
 "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
 "vocab_size": 151936}""")
MIXTRAL: dict[str, Any] = json.loads("""
{"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
 "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
 "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
 "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": false,
 "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": null,
 "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": true,
 "vocab_size": 32000}""")
PUBLISHED = {"qwen2_moe": QWEN15_MOE, "olmoe": OLMOE, "qwen3_moe": QWEN3_30B, "mixtral": MIXTRAL}


def test_qwen15_moe() -> None:
    config = parse_config(QWEN15_MOE)
    assert (config.num_layers, config.moe_layers, config.router.num_experts) == (24, tuple(range(24)), 60)
    assert (config.router.top_k, config.router.normalise, config.expert_intermediate_size) == (4, False, 1408)
    assert (config.shared_intermediate_size, config.shared_gate, config.attention.qkv_bias) == (5632, True, True)
    assert (config.attention.qk_norm, config.attention.o_bias, config.dense_intermediate_size) == ("none", False, 0)
    assert config.rope == RopeConfig(128, 1e6)
    assert (config.max_context, config.eos_token_ids, config.bos_token_id) == (8192, (151643,), 151643)


def test_olmoe() -> None:
    config = parse_config(OLMOE)
    assert (config.attention.qk_norm, config.attention.qkv_bias, config.attention.clip_qkv) == ("full", False, None)
    assert (config.expert_intermediate_size, config.router.top_k, config.norm_eps) == (1024, 8, 1e-5)
    assert (config.bos_token_id, config.shared_intermediate_size) == (None, 0)
    assert parse_config({**OLMOE, "clip_qkv": 8}).attention.clip_qkv == 8.0
    assert parse_config({**OLMOE, "attention_bias": True}).attention.o_bias


def test_qwen3_moe() -> None:
    config = parse_config(QWEN3_30B)
    assert (config.attention.head_dim, config.attention.num_kv_heads, config.attention.qk_norm) == (128, 4, "head")
    assert (config.router.normalise, config.router.num_experts) == (True, 128)
    assert config.attention.scale == 128**-0.5


def test_mixtral() -> None:
    config = parse_config(MIXTRAL)
    assert (config.router.normalise, config.router.num_experts, config.router.top_k) == (True, 8, 2)
    assert (config.attention.head_dim, config.expert_intermediate_size) == (128, 14336)


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_transformers_5_spells_the_same_model_differently(model_type: str) -> None:
    old = PUBLISHED[model_type]
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype", "num_experts")}
    new |= {"rope_parameters": {"rope_theta": old["rope_theta"], "rope_type": "default"}, "dtype": "bfloat16"}
    new["num_local_experts"] = old.get("num_experts", old.get("num_local_experts"))
    assert parse_config(new) == parse_config(old)


@pytest.mark.parametrize("model_type", PUBLISHED)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "relu2"}, ["hidden_act", "relu2", "silu"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type", "dynamic", "yarn"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_type", "llama3"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}}, ["mrope_section"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor is missing"]),
        ({"logit_scale": 0.5}, ["logit_scale", "does not know"]),
        ({"some_new_switch": False}, ["some_new_switch", "does not know"]),
        ({"layer_types": ["sliding_attention"]}, ["layer_types"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"hidden_size": "2048"}, ["hidden_size", "int"]),
        ({"hidden_size": 2048.0}, ["hidden_size", "int"]),
        ({"hidden_size": -1}, ["hidden_size", "between 1"]),
        ({"num_attention_heads": 0}, ["num_attention_heads"]),
        ({"num_attention_heads": True}, ["num_attention_heads"]),
        ({"num_key_value_heads": 3}, ["num_heads is no multiple of num_kv_heads"]),
        ({"num_experts_per_tok": 4096}, ["top_k is greater"]),
        ({"eos_token_id": ["x"]}, ["eos_token_id"]),
        ({"num_experts": 6, "num_local_experts": 7}, ["num_local_experts", "differs"]),
    ],
)
def test_refusals_name_the_option(model_type: str, change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        parse_config({**PUBLISHED[model_type], **change})
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_a_sliding_window_is_refused_only_when_it_would_be_felt(model_type: str) -> None:
    published = PUBLISHED[model_type]
    with pytest.raises(CheckpointError, match="sliding_window = 100"):
        parse_config({**published, "use_sliding_window": True, "sliding_window": 100})
    longer = {**published, "use_sliding_window": True, "sliding_window": published["max_position_embeddings"]}
    assert parse_config(longer) == parse_config(published)


def test_mixtral_uses_its_window_without_a_switch() -> None:
    with pytest.raises(CheckpointError, match="sliding_window = 4096"):
        parse_config({**MIXTRAL, "sliding_window": 4096})


def test_null_options_are_off() -> None:
    assert parse_config({**OLMOE, "some_option_of_tomorrow": None}) == parse_config(OLMOE)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe"])
def test_layers_without_experts(model_type: str) -> None:
    published = {**PUBLISHED[model_type], "num_hidden_layers": 6}
    config = parse_config({**published, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert config.moe_layers == (1, 5)  # every second one, counted from 1, but not layer 3
    assert config.mlp_size(0) == published["intermediate_size"]
    with pytest.raises(CheckpointError, match="moe_layers is empty"):
        parse_config({**published, "mlp_only_layers": [0, 1, 2, 3, 4, 5]})


def test_yarn_follows_transformers() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    rope = parse_config({**QWEN3_30B, "rope_scaling": scaling}).rope
    wanted = RopeConfig(128, 1e6, "yarn", 4.0, 8192, 32.0, 1.0, True, 0.1 * math.log(4) + 1)
    assert rope == wanted
    both = {**scaling, "mscale": 0.5, "mscale_all_dim": 1.0, "truncate": False, "beta_fast": 16}
    rope = parse_config({**QWEN3_30B, "rope_scaling": both}).rope
    assert rope.attention_factor == pytest.approx((0.05 * math.log(4) + 1) / (0.1 * math.log(4) + 1))
    assert (rope.truncate, rope.beta_fast) == (False, 16.0)


def test_linear_rope() -> None:
    rope = parse_config({**OLMOE, "rope_scaling": {"type": "linear", "factor": 2}}).rope
    assert rope == RopeConfig(128, 10000.0, "linear", 2.0)


@pytest.mark.parametrize("model_type", ["llama", None, 7])
def test_an_unknown_architecture_lists_the_known_ones(model_type: object) -> None:
    with pytest.raises(CheckpointError) as error:
        family_of({"model_type": model_type})
    assert all(name in str(error.value) for name in families())


def test_ends_of_text_come_from_both_files() -> None:
    assert read_model(QWEN3_30B, {"eos_token_id": [151645, 151643]}).eos_token_ids == (151645, 151643)
    assert read_model(QWEN3_30B, {"eos_token_id": 7}).eos_token_ids == (151645, 7)
    assert read_model({**QWEN3_30B, "eos_token_id": None}, {}).eos_token_ids == ()
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id"):
        read_model(QWEN3_30B, {"eos_token_id": "</s>"})
