"""Budgets: the arithmetic, spelled out where it refuses. One expert here takes one page of 4096 bytes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from runtime.budget import Slots, overhead_bytes, slots_for_budget, slots_per_layer
from runtime.config import RouterConfig
from runtime.control_groups import memory_limits
from runtime.errors import BudgetError
from runtime.memory import MemoryPlan, limit
from tests.unit.test_router import config

CONFIG = dataclasses.replace(
    config(RouterConfig(8, 3)), num_layers=5, moe_layers=(1, 2, 3, 4), dense_intermediate_size=4
)
SLOT = 4096


def test_a_budget_is_shared_out_equally() -> None:
    assert slots_for_budget(CONFIG, SLOT, 4 * 3 * SLOT, "layer") == Slots(12, 3)
    assert slots_for_budget(CONFIG, SLOT, 4 * 4 * SLOT - 1, "layer") == Slots(12, 3)
    assert slots_for_budget(CONFIG, SLOT, 1 << 40, "layer") == Slots(32, 8)
    assert slots_for_budget(CONFIG, SLOT, 13 * SLOT, "shared") == Slots(13, None)


def test_too_few_slots_are_refused_with_the_arithmetic() -> None:
    with pytest.raises(BudgetError, match=r"4 layers x 3 slots x 0.00 MB = 0 MB at least: --expert-memory 1MiB"):
        slots_for_budget(CONFIG, SLOT, 4 * 3 * SLOT - 1, "layer")
    with pytest.raises(
        BudgetError, match=r"11 slots is smaller than one token cycle of 12 experts \(4 layers x top 3\)"
    ):
        slots_for_budget(CONFIG, SLOT, 11 * SLOT, "shared")
    with pytest.raises(BudgetError, match=r"2 slots per layer cannot hold the top 3"):
        slots_per_layer(CONFIG, SLOT, 2, "layer")
    assert slots_per_layer(CONFIG, SLOT, 9, "layer") == Slots(32, 8)


def test_the_plan_is_a_sum() -> None:
    plan = MemoryPlan(expert_bytes=1_000_000, dense_bytes=2_000_000, kv_bytes=3_000_000, overhead_bytes=10_000_000)
    plan.check(16_000_000, "a limit")
    with pytest.raises(BudgetError, match=r"experts 1 \+ KV cache 3 \+ dense weights 2 \+ overhead 10 = 16 MB.* 15 MB"):
        plan.check(15_000_000, "a limit")


def test_loading_counts_only_where_it_is_the_peak() -> None:
    """Experts and KV cache are allocated when the weights have been loaded."""
    plan = MemoryPlan(1_000_000, 2_000_000, 3_000_000, loading_bytes=5_000_000, overhead_bytes=10_000_000)
    assert plan.total_bytes == 17_000_000
    assert dataclasses.replace(plan, expert_bytes=2_500_000).total_bytes == 17_500_000


def test_a_cuda_build_of_torch_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert overhead_bytes() == 300_000_000
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert overhead_bytes() == 440_000_000


def test_importing_leaves_room_in_the_overhead() -> None:
    """Whatever build of torch is installed here: 100 MB of the planned overhead are left for working."""
    code = "import runtime.engine; print(open('/proc/self/smaps_rollup').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    private = next(int(line.split()[1]) * 1024 for line in done.stdout.splitlines() if line.startswith("Anonymous:"))
    assert 50e6 < private < overhead_bytes() - 100e6


def test_there_is_a_limit_and_it_is_the_smallest() -> None:
    size, name = limit()
    assert 0 < size < 1 << 50
    assert name
    assert all(size <= other for _, other in memory_limits())
