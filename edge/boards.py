"""Which expert slots fit on which Jetson board, from a model's sizes alone: a plan before anything is bought or built.

On the board itself the engine goes by the memory that is free at that moment (runtime/memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.memory import OVERHEAD_BYTES

# What a headless JetPack 6 keeps for itself: of the 15.4 GB that Linux sees on an Orin NX 16 GB, 14.5 GB are free.
SYSTEM_BYTES = 900_000_000
CUDA_CONTEXT_BYTES = 300_000_000  # a process that touches the GPU of an Orin NX
PLAN_CONTEXT = 4096  # tokens of KV cache in the plan, where the model has as many


@dataclass(frozen=True)
class Board:
    """A module of one memory size; `ram_bytes` is what Linux sees of it, the rest is taken by firmware."""

    name: str
    ram_bytes: int

    @property
    def usable_bytes(self) -> int:
        """For weights, KV cache and expert slots."""
        return self.ram_bytes - SYSTEM_BYTES - CUDA_CONTEXT_BYTES - OVERHEAD_BYTES


BOARDS = (Board("8 GB", 7_600_000_000), Board("16 GB", 15_400_000_000))  # MemTotal on Orin NX modules


def board_plan(board: Board, figures: dict[str, Any]) -> dict[str, Any]:
    """Slots per layer beside dense weights and KV cache, in fp16; `figures` as edge.inspect.model_figures makes them.

    `slots_per_layer` may be less than a token's top-k: then the model does not run on this board.
    """
    context = min(PLAN_CONTEXT, figures["max_context"])
    kv_bytes = context * figures["kv_bytes_per_token"]
    expert_bytes = max(0, board.usable_bytes - figures["dense_bytes"] - figures["router_bytes"] - kv_bytes)
    slots = min(figures["experts"], expert_bytes // (figures["moe_layers"] * figures["blob_bytes"]))
    return {
        "board": board.name,
        "usable_bytes": board.usable_bytes,
        "context": context,
        "kv_bytes": kv_bytes,
        "expert_bytes": expert_bytes,
        "slots_per_layer": slots,
        "runs": slots >= figures["top_k"],
    }
