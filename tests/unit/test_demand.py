"""Demand by hand, a prompt at once as token by token, and what the running cache makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.config import RouterConfig
from runtime.demand import Demand
from tests.storages import MemoryStorage, make_cache, residents

RULES = RouterConfig(num_experts=3, top_k=1)


def test_a_token_by_hand() -> None:
    """Scores 1 : 1/2 : 1/4. After one token used is 0.02 for expert 0 alone, wanted 0.2 times 1, 1/2, 1/4."""
    demand = Demand(2, RULES)
    demand.see(1, np.log([[4.0, 2.0, 1.0]]), np.array([[0]]))
    assert demand.values[1].tolist() == pytest.approx([0.02 + 0.02, 0.01, 0.005], rel=1e-3)  # logits are fp16
    demand.see(1, np.log([[1.0, 1.0, 4.0]]), np.array([[2]]))
    wanted = [0.8 * 0.2 + 0.2 / 4, 0.8 * 0.1 + 0.2 / 4, 0.8 * 0.05 + 0.2]
    used = [0.98 * 0.02, 0.0, 0.02]
    assert demand.values[1].tolist() == pytest.approx(
        [u + 0.1 * w for u, w in zip(used, wanted, strict=True)], rel=1e-3
    )
    assert not demand.values[0].any()
    demand.clear()
    assert not demand.values.any()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_prompt_at_once_is_its_tokens_one_by_one(scoring: str) -> None:
    rules = RouterConfig(num_experts=8, top_k=3, scoring=scoring)  # type: ignore[arg-type]
    logits = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    experts = np.argsort(-logits)[:, :3]
    once, steps = Demand(1, rules), Demand(1, rules)
    once.see(0, logits, experts)
    for row in range(20):
        steps.see(0, logits[row : row + 1], experts[row : row + 1])
    assert np.allclose(once.values, steps.values, rtol=1e-12)


def test_the_expert_that_nearly_was_chosen_stays() -> None:
    """Two slots: 0 is used, then 1; LRU would let 0 go, but the gate nearly took it twice and cares little for 1."""
    storage = MemoryStorage(layers=1, experts=3, blob_bytes=8192)
    left = {}
    for policy in ("lru", "gate"):
        cache, loader = make_cache(storage, layers=1, slots=2, policy=policy)
        for expert, scores in ((0, [8, 1, 7]), (1, [7, 8, 1]), (2, [7, 1, 8])):
            cache.saw(0, torch.tensor([scores]).float().log(), torch.tensor([[expert]]))
            with cache.fetch(0, [expert]) as request:
                list(request)
        left[policy] = residents(cache, 0)
        loader.close()
    assert left == {"lru": {1, 2}, "gate": {0, 2}}
