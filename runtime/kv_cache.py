"""The KV cache: two buffers per layer, allocated once for the whole context and owned by the runtime."""

from __future__ import annotations

import math

import torch

from runtime.config import ModelConfig


class KVCache:
    """Keys and values (or MLA latents and rope keys) of every layer, rows in token order.

    `keys[layer]` is [capacity, *config.attention.cache_rows[0]], `values[layer]` likewise with cache_rows[1], both in
    the compute dtype. Rows below `length` are valid.
    """

    def __init__(self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        key_row, value_row = config.attention.cache_rows
        shape = (config.num_layers, capacity)
        self.keys = torch.zeros(*shape, *key_row, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, *value_row, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the rows of the S next tokens; `advance` makes them valid once every layer has written its own."""
        end = self.length + keys.shape[0]
        self.keys[layer, self.length : end] = keys
        self.values[layer, self.length : end] = values

    def advance(self, tokens: int) -> None:
        """`tokens` more rows are valid in every layer."""
        self.length += tokens


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token takes in the cache over all layers."""
    values = sum(math.prod(row) for row in config.attention.cache_rows)
    return config.num_layers * values * dtype.itemsize
