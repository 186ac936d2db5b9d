"""Sizes of a model, from its config alone: what stays in memory, what a token's arithmetic reads, what a miss reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from runtime import layout
from runtime.config import ModelConfig
from runtime.errors import UsageError

_VALUE_BYTES = 2  # fp16


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model: what stays in memory, and what one token's arithmetic reads per layer with experts."""

    resident_bytes: int  # dense weights and routers
    kv_bytes: int
    head_bytes: int  # what the head's arithmetic reads
    dense_layer_bytes: float  # dense weights without the shared experts, all layers spread over those with experts
    shared_bytes: float
    expert_bytes: int
    blob_bytes: int
    blocks: int  # dense blocks: all layers
    layers: int  # those with experts
    experts: int
    top_k: int


def model_sizes(config: ModelConfig, context: int) -> Sizes:
    """From the config alone; fp16 as in a bundle. Raises UsageError for a context that the model does not have."""
    if not 1 <= context <= config.max_context:
        raise UsageError(f"--context {context}: this model allows 1 to {config.max_context} tokens")
    layers, moe = range(config.num_layers), len(config.moe_layers)
    dense = sum(_bytes(layout.layer_tensors(config, layer)) for layer in layers)
    shared = 3 * config.hidden_size * config.shared_intermediate_size * _VALUE_BYTES
    head, embed = _bytes(layout.head_tensors(config)), _bytes(layout.embed_tensors(config))
    routers = 4 * sum(math.prod(shape) for shape in layout.router_tensors(config).values())
    row = sum(math.prod(row) for row in config.attention.cache_rows)
    return Sizes(
        resident_bytes=dense + head + embed + routers,
        kv_bytes=context * _VALUE_BYTES * config.num_layers * row,
        head_bytes=_VALUE_BYTES * config.vocab_size * config.hidden_size,  # tied or not, it is read
        dense_layer_bytes=(dense + routers) / moe - shared,
        shared_bytes=shared,
        expert_bytes=layout.expert_bytes(config),
        blob_bytes=layout.padded(layout.expert_bytes(config)),
        blocks=config.num_layers,
        layers=moe,
        experts=config.router.num_experts,
        top_k=config.router.top_k,
    )


def _bytes(tensors: dict[str, tuple[int, ...]]) -> int:
    return _VALUE_BYTES * sum(math.prod(shape) for shape in tensors.values())
