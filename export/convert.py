"""Values on their way from a checkpoint's dtype to the bundle's: exact, or refused."""

from __future__ import annotations

import numpy as np
import torch

from runtime import native
from runtime.errors import CheckpointError

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK = 1 << 17  # values per step: the fp32 intermediate stays in the L2 cache


def convert(source: torch.Tensor, target: torch.Tensor, where: str) -> None:
    """Copy `source` (1-D; fp32, fp16 or bf16) into `target` (same length; fp16 or fp32), rounding to nearest even.

    Raises CheckpointError, which opens with `where` and tells the range of `source`, when a value is NaN, infinite or
    does not fit. Values below the subnormals of fp16 become zero.
    """
    finite = None
    if source.dtype is torch.bfloat16 and target.dtype is torch.float16:
        finite = native.half_from_bf16(source, target)
        if finite is None:
            _by_way_of_fp32(source, target)
    else:
        target.copy_(source)
    if not (all_finite(target) if finite is None else finite):
        raise CheckpointError(f"{where} {_problem(source, target.dtype)}")


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value (fp16 or fp32, 1-D) is NaN or infinite."""
    if values.numel() == 0:
        return True
    # The bits of the non-finite values are the greatest of each sign: two passes of integer maximum are more than ten
    # times faster than torch.isfinite.
    half = values.dtype is torch.float16
    raw = values.numpy().view(np.int16 if half else np.int32)
    positive, negative = (0x7C00, 0xFC00) if half else (0x7F800000, 0xFF800000)
    return bool(raw.max() < positive and raw.view(np.uint16 if half else np.uint32).max() < negative)


def _by_way_of_fp32(source: torch.Tensor, target: torch.Tensor) -> None:
    # torch's direct bf16 -> fp16 is not vectorised: two exact or once-rounding steps are 1.6 times faster.
    wide = torch.empty(min(_BLOCK, source.numel()), dtype=torch.float32)
    for start in range(0, source.numel(), _BLOCK):
        part = source[start : start + _BLOCK]
        target[start : start + _BLOCK].copy_(wide[: part.numel()].copy_(part))


def _problem(source: torch.Tensor, dtype: torch.dtype) -> str:
    values = source.float()
    nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
    finite = values[values.isfinite()]
    span = f"{finite.min().item():g} to {finite.max().item():g}" if finite.numel() else "none is finite"
    if nan or infinite:
        return f"has {nan} NaN and {infinite} infinite values (the others: {span}): the checkpoint is damaged"
    name = str(dtype).removeprefix("torch.")
    return f"has values from {span}, more than {name} holds (up to {torch.finfo(dtype).max:g})"
