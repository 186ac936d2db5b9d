"""Which expert slots fit on which Jetson board, from a model's config alone: a plan before anything is bought or built.

The boards are device profiles (profiles/devices), the sum is that of `edge forecast`. On the board itself the engine
goes by the memory that is free at that moment (runtime/memory.py).
"""

from __future__ import annotations

from typing import Any

from profiles.device import load_device
from profiles.forecast import PLAN_CONTEXT, fit
from profiles.sizes import model_sizes
from runtime.config import ModelConfig

BOARDS = ("orin-nx-8gb", "orin-nx-16gb")


def board_plan(board: str, config: ModelConfig) -> dict[str, Any]:
    """Slots per layer beside dense weights and KV cache, in fp16.

    `slots_per_layer` may be less than a token's top-k: then the model does not run on this board.
    """
    context = min(PLAN_CONTEXT, config.max_context)
    sizes = model_sizes(config, context)
    found = fit(sizes, load_device(board))
    return {
        "board": board,
        "usable_bytes": found.usable_bytes,
        "context": context,
        "kv_bytes": sizes.kv_bytes,
        "expert_bytes": found.expert_bytes,
        "slots_per_layer": found.slots,
        "runs": found.runs,
    }
