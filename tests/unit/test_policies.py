"""One contract for every policy, and hand-derived orders for each."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.errors import UsageError
from runtime.policies import LFRU, LFU, LRU, POLICIES, GateAware, make_policy


@pytest.mark.parametrize("name", POLICIES)
def test_victim_is_resident_and_not_kept(name: str) -> None:
    policy = make_policy(name, "abc", np.zeros(3))
    assert policy.victim(set()) is None
    for key in "abc":
        policy.insert(key)
    assert policy.victim({"a", "b"}) == "c"
    assert policy.victim({"a", "b", "c"}) is None
    policy.remove("c")
    assert policy.victim({"a", "b"}) is None


def test_lru_evicts_the_longest_unused() -> None:
    policy = LRU()
    for key in "abc":
        policy.insert(key)
    policy.touch("a")
    assert policy.victim(set()) == "b"


def test_lfu_evicts_the_rarest_then_the_oldest() -> None:
    policy = LFU()
    for key in "abc":
        policy.insert(key)
    policy.touch("a")
    policy.touch("b")
    assert policy.victim(set()) == "c"  # uses: a 2, b 2, c 1
    policy.touch("c")
    assert policy.victim(set()) == "a"  # all 2: a was used longest ago


def test_lfru_lets_old_frequency_fade() -> None:
    policy = LFRU()
    policy.insert("a")
    for _ in range(3):
        policy.touch("a")  # 4 uses, last at time 4
    policy.insert("b")  # 1 use at time 5
    assert policy.victim(set()) == "b"  # scores: a 4 / 2 = 2, b 1 / 1 = 1
    for key in "cdefgh":
        policy.insert(key)  # times 6 to 11
    policy.touch("b")  # 2 uses at time 12; a: 4 / 9 = 0.44, b 2, h 1 / 2, c 1 / 7 = 0.14
    assert policy.victim(set()) == "c"
    assert policy.victim(set("cdefg")) == "a"  # 0.44 is less than h's 0.5


def test_the_gate_aware_policy_looks_at_the_demand_of_the_moment() -> None:
    demand = np.array([0.5, 0.2, 0.9, 0.1])
    policy = GateAware("abcd", demand)
    for key in "abc":
        policy.insert(key)
    assert policy.victim(set()) == "b"  # d is less in demand, but not here
    demand[:] = [0.1, 0.2, 0.9, 0.1]
    assert policy.victim(set()) == "a"
    assert policy.victim({"a"}) == "b"
    policy.remove("a")
    assert policy.victim(set()) == "b"


def test_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown policy 'belady' \\(known: lru, lfu, lfru, fifo, gate\\)"):
        make_policy("belady", [], np.zeros(0))
