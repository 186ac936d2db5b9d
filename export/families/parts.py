"""Parts of a ModelConfig that many families have alike; a family's file then says only what is its own."""

from __future__ import annotations

from typing import Any

from export.families.options import Options
from runtime.config import AttentionConfig


def basics(o: Options) -> dict[str, Any]:
    """The fields of a ModelConfig that every family takes from the same options. Raises CheckpointError."""
    return {
        "family": o.model_type,
        "vocab_size": o.size("vocab_size"),
        "hidden_size": o.size("hidden_size"),
        "num_layers": o.size("num_hidden_layers"),
        "max_context": o.size("max_position_embeddings"),
        "activation": o.activation(),
        "tied_embeddings": o.flag("tie_word_embeddings", False),
        "bos_token_id": o.integer("bos_token_id", None),
        "eos_token_ids": o.token_ids("eos_token_id"),
    }


def grouped_query(heads: int, kv_heads: int, head_dim: int) -> AttentionConfig:
    """Llama's attention: q, k and v of one size per head, no biases, no norms, scores divided by sqrt(head_dim).

    What differs goes through dataclasses.replace.
    """
    return AttentionConfig(
        kind="gqa",
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        rope_head_dim=head_dim,
        scale=head_dim**-0.5,
    )


def sparse_layers(num_layers: int, step: int, dense: list[int]) -> tuple[int, ...]:
    """Layers with experts, by Qwen's `decoder_sparse_step` and `mlp_only_layers`."""
    return tuple(n for n in range(num_layers) if n not in dense and step > 0 and (n + 1) % step == 0)
