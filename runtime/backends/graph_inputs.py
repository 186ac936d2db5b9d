"""Inputs of the bundle's graphs that only their shapes decide; every back-end that runs graphs gives the same ones."""

from __future__ import annotations

import torch

from runtime.config import ModelConfig


class CausalMask:
    """The input `mask`; the last answer is kept, because every layer of a step asks the same."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._range = (-1, 0)
        self._mask = torch.empty(0)

    def rows(self, past: int, count: int) -> torch.Tensor:
        """[S, T + S] fp32 for S = count: token i sees the past and new tokens up to itself; without a past, T is one
        hidden row.

        The graphs know no T = 0: products with an empty past kill ONNX Runtime up to 1.31 (a division by zero in its
        fused transpose and product).
        """
        if self._range != (past, count):
            hidden = torch.full((count, count), float("-inf")).triu(1)
            before = torch.full((count, max(past, 1)), 0.0 if past else float("-inf"))
            self._range = (past, count)
            self._mask = torch.cat([before, hidden], dim=1).to(self._device)
        return self._mask


def no_past(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`past_k` and `past_v` of one row, which the mask hides."""
    keys, values = (torch.zeros(1, *row, dtype=dtype, device=device) for row in config.attention.cache_rows)
    return keys, values
