"""The dense model in transformers: what the mixture must equal. Only for calibration and checks, not for the build."""

from __future__ import annotations

from typing import TYPE_CHECKING

from demo.source import LAYER_NAMES, DenseSource

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def dense_model(source: DenseSource, round_to_fp16: bool = False) -> LlamaForCausalLM:
    """The dense model in float32, optionally with its weights rounded to fp16 as the checkpoint's are."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    c = source.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_context,
        rope_parameters={"rope_theta": c.rope_theta, "rope_type": "default"},
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {"model.embed_tokens.weight": source.embedding(), "model.norm.weight": source.final_norm()}
    for layer in range(c.num_layers):
        for name in LAYER_NAMES:
            weights[f"model.layers.{layer}.{name}.weight"] = source.layer(layer, name)
    tensors = {name: torch.from_numpy(weight.copy()) for name, weight in weights.items()}
    if round_to_fp16:
        tensors = {name: tensor.half().float() for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.to_empty(device="cpu")
    model.load_state_dict(tensors)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer is computed, not loaded
    return model.eval()
