"""Random-weight checkpoints, made by transformers itself, small enough to build in a test.

Every weight is rounded to a value that fp16 (and the saved dtype) can hold, so a bundle and the reference model compute
from equal numbers. Gates are scaled up: a routing decision then hangs on more than rounding.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("qwen2_moe", "olmoe", "qwen3_moe", "mixtral", "granitemoe", "deepseek_v2", "deepseek_v3", "glm4_moe")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_COMMON: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
_LATENT: dict[str, Any] = {
    "moe_intermediate_size": 40,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_experts": 7, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56},
    "olmoe": {"num_experts": 10},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 40, "head_dim": 24, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 5},
    "granitemoe": {
        "num_local_experts": 6,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.25,
        "logits_scaling": 6.0,
    },
    "deepseek_v2": {
        **_LATENT,
        "n_routed_experts": 9,
        "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {**_LATENT, "n_routed_experts": 12, "n_group": 4, "topk_group": 2, "norm_topk_prob": True},
    "glm4_moe": {
        "moe_intermediate_size": 40,
        "head_dim": 24,
        "attention_bias": True,
        "n_routed_experts": 12,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
    },
}


def make_checkpoint(
    directory: Path,
    family: str,
    *,
    dtype: str = "fp32",
    shards: int = 1,
    fused: bool = False,
    tokenizer: bool = False,
    seed: int = 0,
    gate_std: float = 4.0,
    **overrides: Any,
) -> Path:
    """Write a seeded random checkpoint of `family` into `directory` and return it.

    `overrides` go into the transformers config. `dtype` is one of fp32, bf16, fp16; `shards` > 1 splits the weights
    over about as many files with an index; `fused` writes transformers' in-memory expert tensors (experts.gate_up_proj
    [E, 2I, H]) instead of the names of the hub. Router logits have a standard deviation of about `gate_std`.
    """
    model = _random_model(family, _DTYPES[dtype], seed, gate_std, overrides)
    directory.mkdir(parents=True, exist_ok=True)
    if fused:
        model.config.save_pretrained(directory)
        tied = ["lm_head.weight"] if model.config.tie_word_embeddings else []
        write_weights(directory, {n: t for n, t in model.state_dict().items() if n not in tied}, shards)
    else:
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(directory, max_shard_size=total if shards == 1 else math.ceil(total / shards))
    (directory / "generation_config.json").unlink(missing_ok=True)
    if tokenizer:
        _write_tokenizer(directory)
    return directory


def load_reference(directory: Path) -> Any:
    """The transformers model of a checkpoint, in fp32, ready to compare with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    )
    return model.eval()


def write_weights(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Save tensors as model.safetensors, or round-robin over `shards` files with their index."""
    from safetensors.torch import save_file

    names = sorted(tensors)
    if shards == 1:
        save_file({n: tensors[n].contiguous() for n in names}, directory / "model.safetensors", {"format": "pt"})
        return
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(names)}
    for file in files:
        part = {n: tensors[n].contiguous() for n in names if weight_map[n] == file}
        save_file(part, directory / file, {"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _random_model(family: str, dtype: torch.dtype, seed: int, gate_std: float, overrides: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**_COMMON, **_FAMILY[family], **overrides}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        biases = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
        for name, weight in [*model.named_parameters(), *biases]:
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(_scaled(name, noise, gate_std).to(dtype).to(torch.float16).float())
    return model.to(dtype)


def _scaled(name: str, noise: torch.Tensor, gate_std: float) -> torch.Tensor:
    if "norm" in name:
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.2 * noise
    if "embed_tokens" in name:
        return noise
    std = gate_std if name.endswith(("mlp.gate.weight", "router.weight")) else 1.0
    return std * noise / math.sqrt(noise.shape[-1])


def _write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: ids 0-2 are <pad>, <s>, </s>; bytes follow (so vocab_size >= 259)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": template + "{% if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"bos_token_id": 1, "eos_token_id": [2], "temperature": 0.7, "top_p": 0.9, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(generation))
