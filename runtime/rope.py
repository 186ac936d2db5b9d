"""Rotary position embedding tables (arXiv 2104.09864), with linear scaling and YaRN (arXiv 2309.00071)."""

from __future__ import annotations

import math

import torch

from runtime.config import RopeConfig


class RopeTable:
    """cos and sin of the positions asked for; the last answer is kept, because every layer of a step asks the same."""

    def __init__(self, config: RopeConfig, device: torch.device | str = "cpu") -> None:
        """Rows are computed on the CPU, so that every device turns by the same numbers, and lie on `device`."""
        self._device = device
        self._frequencies = inverse_frequencies(config)
        factor = torch.ones(config.dim // 2)
        factor[: config.turning_pairs] = config.attention_factor  # what passes keeps its size
        self._factor = torch.cat([factor, factor])
        self._range = (-1, 0)
        self._rows = (torch.empty(0), torch.empty(0))

    def rows(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [count, dim] fp32 for positions start ... start + count - 1."""
        if self._range != (start, count):
            angles = torch.outer(torch.arange(start, start + count, dtype=torch.float32), self._frequencies)
            angles = torch.cat([angles, angles], dim=-1)
            self._range = (start, count)
            rows = angles.cos() * self._factor, angles.sin() * self._factor
            self._rows = rows[0].to(self._device), rows[1].to(self._device)
        return self._rows


def inverse_frequencies(config: RopeConfig) -> torch.Tensor:
    """Angle per position of each of the dim / 2 pairs, fp32; 0 for the pairs that do not turn."""
    turning = 2 * config.turning_pairs
    exponents = torch.arange(0, turning, 2, dtype=torch.float32) / turning
    frequencies = 1.0 / config.theta**exponents
    if config.kind == "linear":
        frequencies = frequencies / config.factor
    elif config.kind == "yarn":
        ramp = _yarn_ramp(config)
        frequencies = frequencies / config.factor * ramp + frequencies * (1.0 - ramp)
    return torch.nn.functional.pad(frequencies, (0, config.dim // 2 - config.turning_pairs))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x [S, heads, dim] by cos / sin [S, dim], in the dtype of x, rotate-half convention."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _yarn_ramp(config: RopeConfig) -> torch.Tensor:
    """0 for pairs that turn often within the original context (kept), 1 for those that do not (interpolated)."""
    original, turning = config.original_context, 2 * config.turning_pairs
    assert original is not None, "a yarn config has its original context"

    def pair_with(rotations: float) -> float:
        return turning * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turning - 1)
    pairs = torch.arange(config.turning_pairs, dtype=torch.float32)
    return ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
