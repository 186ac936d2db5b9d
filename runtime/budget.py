"""The expert budget: from what the user asked for to slots, refused with the arithmetic when it cannot work."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from runtime import backends
from runtime.bundle import Bundle
from runtime.config import ModelConfig
from runtime.errors import BudgetError
from runtime.kv_cache import kv_bytes_per_token
from runtime.memory import CUDA_BUILD_BYTES, OVERHEAD_BYTES, MemoryPlan, limit
from runtime.options import EngineOptions

_KEEP_FREE = 0.1  # share of the free memory that an automatic budget leaves to others


@dataclass(frozen=True)
class Slots:
    """A resolved expert budget: slots over all layers, and per layer where the scope is "layer"; beside those, slots
    for experts that are read on a guess.
    """

    total: int
    per_layer: int | None
    beside: int = 0


def plan_run(
    bundle: Bundle, options: EngineOptions, backend: str, dtype: torch.dtype, context: int, notes: list[str]
) -> tuple[Slots, MemoryPlan]:
    """Resolve the expert budget and check the whole sum against the memory there is.

    Automatic choices are told in `notes`. Raises BudgetError.
    """
    rest = _without_experts(bundle, backend, dtype, context)
    limit_bytes, limit_name = limit()
    slots, left_bytes = _resolve(bundle, options, rest, limit_bytes, notes)
    config, slot_bytes = bundle.config, bundle.manifest.expert.file_bytes
    beside = guesses(config, slots, backend, left_bytes // slot_bytes) if options.prefetch is None else options.prefetch
    plan = replace(rest, expert_bytes=(slots.total + beside) * slot_bytes)
    plan.check(limit_bytes, limit_name)
    return replace(slots, beside=beside), plan


def guesses(config: ModelConfig, slots: Slots, backend: str, left: int) -> int:
    """How many experts are read on a guess where nobody says so: one, on a CPU, if the budget has `left` a slot for it.

    To take one from every layer would cost more than guesses save. A GPU has not shown yet what it gains.
    """
    everything = len(config.moe_layers) * config.router.num_experts
    return int(backend in backends.ON_CPU and slots.total < everything and left > 0)


def _without_experts(bundle: Bundle, backend: str, dtype: torch.dtype, context: int) -> MemoryPlan:
    largest = max(entry.bytes for name, entry in bundle.manifest.files.items() if name.startswith("dense/"))
    return MemoryPlan(
        expert_bytes=0,
        dense_bytes=backends.weight_bytes(backend, bundle, dtype) + backends.scratch_bytes(backend, bundle, context),
        kv_bytes=context * kv_bytes_per_token(bundle.config, dtype),
        # On a GPU a file or an engine is read into ordinary memory first.
        loading_bytes=0 if dtype == torch.float16 and backend in backends.ON_CPU else largest,
        overhead_bytes=overhead_bytes(),
    )


def overhead_bytes() -> int:
    """What a run holds besides the model: it depends on the build of torch, not on whether there is a GPU."""
    return OVERHEAD_BYTES + (CUDA_BUILD_BYTES if torch.version.cuda else 0)


def _resolve(
    bundle: Bundle, options: EngineOptions, rest: MemoryPlan, limit_bytes: int, notes: list[str]
) -> tuple[Slots, int]:
    """Slots, and the bytes that the budget has left; a number of slots is one more slot of memory."""
    config, slot_bytes = bundle.config, bundle.manifest.expert.file_bytes
    beside = (options.prefetch or 0) * slot_bytes
    if options.slots_per_layer is not None:
        if options.slots_per_layer > config.router.num_experts:
            notes.append(f"slots: {config.router.num_experts} per layer, one for each expert, are all it can use")
        slots = slots_per_layer(config, slot_bytes, options.slots_per_layer, options.scope)
        return slots, slot_bytes
    if options.expert_memory_bytes is not None:
        budget = options.expert_memory_bytes - beside
        slots = slots_for_budget(config, slot_bytes, budget, options.scope)
        return slots, budget - slots.total * slot_bytes
    # Without a wish: what fits beside the rest with some memory to spare, but at least one token cycle.
    free = int((limit_bytes - rest.total_bytes) * (1 - _KEEP_FREE))
    budget = max(free - beside, config.experts_per_token * slot_bytes)
    slots = slots_for_budget(config, slot_bytes, budget, options.scope)
    share = slots.total / (len(config.moe_layers) * config.router.num_experts)
    notes.append(f"expert memory: {slots.total * slot_bytes / 1e6:.0f} MB, {share:.0%} of all experts, fits here")
    return slots, budget - slots.total * slot_bytes


def slots_for_budget(config: ModelConfig, slot_bytes: int, budget_bytes: int, scope: str) -> Slots:
    """How many slots a budget gives. Raises BudgetError, with the arithmetic, when they cannot hold one step."""
    layers, top_k = len(config.moe_layers), config.router.top_k
    if scope == "shared":
        total = min(budget_bytes // slot_bytes, layers * config.router.num_experts)
        return _check_shared(config, slot_bytes, total)
    per_layer = min(budget_bytes // (layers * slot_bytes), config.router.num_experts)
    if per_layer < top_k:
        need = layers * top_k * slot_bytes
        raise BudgetError(
            f"an expert budget of {budget_bytes / 1e6:.0f} MB gives {per_layer} slots in each of {layers} layers, but "
            f"a token needs its top {top_k} experts there: {layers} layers x {top_k} slots x {slot_bytes / 1e6:.2f} MB "
            f"= {need / 1e6:.0f} MB at least: --expert-memory {-(-need // (1 << 20))}MiB"
        )
    return Slots(layers * per_layer, per_layer)


def slots_per_layer(config: ModelConfig, slot_bytes: int, count: int, scope: str) -> Slots:
    """The slots of `--slots-per-layer`. Raises BudgetError when a layer could not hold its top-k experts."""
    if count < config.router.top_k:
        raise BudgetError(
            f"{count} slots per layer cannot hold the top {config.router.top_k} experts that a token needs in a layer: "
            f"--slots-per-layer {config.router.top_k} or more ({slot_bytes / 1e6:.2f} MB each, in "
            f"{len(config.moe_layers)} layers)"
        )
    count = min(count, config.router.num_experts)
    total = count * len(config.moe_layers)
    return Slots(total, None if scope == "shared" else count)


def _check_shared(config: ModelConfig, slot_bytes: int, total: int) -> Slots:
    cycle = config.experts_per_token
    if total < cycle:
        need = cycle * slot_bytes
        raise BudgetError(
            f"a shared cache of {total} slots is smaller than one token cycle of {cycle} experts "
            f"({len(config.moe_layers)} layers x top {config.router.top_k}) and would never hit: "
            f"--expert-memory {-(-need // (1 << 20))}MiB or more, or --scope layer"
        )
    return Slots(total, None)
