"""What a back-end answers. The decoder speaks only these verbs; shapes as in runtime/config.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from runtime.arena import Slots
from runtime.kv_cache import KVCache


class Backend(Protocol):
    """Arithmetic on one device in one compute dtype.

    The residual stream `x` is always fp32 on the device; `h` (normed input of router and experts) has the compute
    dtype. A call may return before the device has finished; `synchronise` waits.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    arithmetic: str  # what computes one token's products, for people and records

    def step(self, count: int) -> AbstractContextManager[None]:
        """Around a forward pass over `count` tokens and the choice of the next: the back-end may set its threads."""
        ...

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [S] (int64, CPU) to x [S, H] fp32."""
        ...

    def run_block(self, layer: int, x: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of one layer for the S next tokens at positions cache.length ... cache.length + S - 1.

        Writes their rows into `cache` (whose length the decoder advances after the last layer). Returns the residual
        after attention [S, H] fp32, and h [S, H].
        """
        ...

    def run_mlp(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """The layer's shared experts, or its whole MLP where it has no experts: h [S, H] to [S, H] fp32.

        Only called for layers whose config.mlp_size is not 0.
        """
        ...

    def run_expert(self, h: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """One expert on its tokens: h [n, H], slot = the blob's fp16 values (1-D, from the arena), to [n, H] fp32."""
        ...

    def run_experts(self, h: torch.Tensor, slots: Sequence[torch.Tensor]) -> torch.Tensor:
        """Several experts on one token, h [1, H] to [len(slots), H] fp32, with the bits of `run_expert`."""
        ...

    def run_head(self, x: torch.Tensor) -> torch.Tensor:
        """Final norm and vocabulary projection: x [S, H] to logits [S, V] fp32."""
        ...

    def allocate_slots(self, slots: int, slot_bytes: int, value_bytes: int) -> Slots:
        """Memory for experts: `slots` of `slot_bytes` (whole pages), of which `value_bytes` are values.

        Raises BudgetError when it cannot be had.
        """
        ...

    def synchronise(self) -> None:
        """Wait until everything asked for has been computed."""
        ...


def one_by_one(
    run_expert: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], h: torch.Tensor, slots: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Backend.run_experts where nothing is gained by computing experts together."""
    return torch.cat([run_expert(h, slot) for slot in slots])
