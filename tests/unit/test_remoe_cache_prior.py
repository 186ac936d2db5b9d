"""Cache-prior routing: its rule by hand, strength 0 is stock bit for bit, and a strong prior stays in the cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.exporter import export_bundle
from runtime.cache_prior import CachePrior, CachePriorRouter, raise_logits
from runtime.config import RouterConfig
from runtime.engine import Engine, EngineOptions, GenerateOptions
from runtime.errors import UsageError
from runtime.prior_rows import Array, Spread, prefer_cached
from runtime.router import Router
from tests.checkpoints import make_checkpoint
from tests.unit.test_router import config

IDS = [5, 6, 7, 8]
LOGITS = torch.tensor([[4.0, 3.0, 2.5, 0.0]])


class Cache:
    """Holds what a test says."""

    def __init__(self, *experts: int) -> None:
        self.experts = set(experts)

    def held(self, layer: int) -> Array:
        return np.isin(np.arange(4), list(self.experts))

    def full(self, layer: int) -> bool:
        return bool(self.experts)


def prefer(
    options: CachePrior, cached: list[int], rules: RouterConfig | None = None, spread: float = 4.0, full: bool = True
) -> list[int]:
    mask = np.isin(np.arange(4), cached)[None]
    rules = rules or RouterConfig(4, 2)
    state = mask, np.array([[full]]), np.array([[spread]])
    experts, _, _ = prefer_cached(options, rules, LOGITS.numpy(), None, *state)
    return experts[0].tolist()


def test_a_cached_expert_gains_a_share_of_the_spread() -> None:
    assert prefer(CachePrior(0.1), [2]) == [0, 1]  # 2.5 + 0.4 is still less than 3
    assert prefer(CachePrior(0.2), [2]) == [0, 2]  # 2.5 + 0.8 is more; 0 is the true best: 4 + 0.8
    assert prefer(CachePrior(1.1), [2, 3]) == [0, 2]  # 3 has 0 + 4.4, 2 has 6.9, 0 has 8.4
    assert prefer(CachePrior(1.1, top_j=0), [2, 3]) == [2, 3]  # 0 keeps its 4
    assert prefer(CachePrior(1.1, top_j=2), [2, 3]) == [0, 1]


def test_the_spread_may_be_that_of_the_token() -> None:
    """z_(1) - z_(2) is 1: a strength of 0.4 lifts expert 2 to 2.9, 0.6 to 3.1; the mean spread plays no part."""
    assert prefer(CachePrior(0.4, scaling="token"), [2], spread=100.0) == [0, 1]
    assert prefer(CachePrior(0.6, scaling="token"), [2], spread=0.0) == [0, 2]


def test_by_energy_a_cached_expert_gains_a_weight() -> None:
    """Weights of the two best are 0.731 and 0.269; experts 2 and 3 would have 0.163 and 0.013 on that scale.

    sqrt(0.163^2 + 0.22^2) = 0.274 passes 0.269, with 0.2 it is 0.258. Expert 3 needs 0.269 by itself.
    """
    assert prefer(CachePrior(0.2, scaling="energy"), [2]) == [0, 1]
    assert prefer(CachePrior(0.22, scaling="energy"), [2]) == [0, 2]
    assert prefer(CachePrior(0.268, scaling="energy"), [3]) == [0, 1]
    assert prefer(CachePrior(0.27, scaling="energy"), [3]) == [0, 3]
    # without the guard of the true best: sqrt(0.163^2 + 0.72^2) = 0.738 passes 0.731, expert 3 with 0.72 does not
    assert prefer(CachePrior(0.7, top_j=0, scaling="energy"), [2, 3]) == [0, 2]
    assert prefer(CachePrior(0.72, top_j=0, scaling="energy"), [2, 3]) == [2, 0]


def test_by_energy_a_read_into_a_free_slot_costs_a_fifth() -> None:
    """Weights of experts 1 and 2 are 0.269 and 0.163 on the scale of the two best, and 0.269^2 - 0.163^2 = 0.214^2:
    with a free slot a fifth of the energy must be as much, 0.214 x sqrt(5) = 0.478. The published rule does not ask.
    """
    assert prefer(CachePrior(0.22, scaling="energy"), [2], full=True) == [0, 2]
    assert prefer(CachePrior(0.47, scaling="energy"), [2], full=False) == [0, 1]
    assert prefer(CachePrior(0.49, scaling="energy"), [2], full=False) == [0, 2]
    assert prefer(CachePrior(0.2), [2], full=False) == [0, 2]


def test_by_energy_a_sigmoid_score_stays_a_score() -> None:
    rules = RouterConfig(4, 2, scoring="sigmoid")
    scores = LOGITS.sigmoid()
    raised = raise_logits(CachePrior(0.1, scaling="energy"), rules, LOGITS, torch.zeros(1, 1)).sigmoid()
    wanted = (scores**2 + (0.1 * scores[0, :2].sum()) ** 2).sqrt()
    assert raised.tolist()[0] == pytest.approx([min(w, 1 - 1e-6) for w in wanted[0].tolist()], abs=1e-6)
    assert raise_logits(CachePrior(0.0, scaling="energy"), rules, LOGITS, torch.zeros(1, 1)) is LOGITS


def test_the_mean_spread_runs_over_a_sequence() -> None:
    spread = Spread()
    assert spread.update(np.array([[0.0, 4.0], [1.0, 3.0]])).tolist() == [[3.0]]
    assert spread.update(np.array([[0.0, 9.0]])).tolist() == [[5.0]]
    per_row = Spread()
    per_row.update(np.array([[0.0, 4.0], [1.0, 3.0]]), together=False)
    assert per_row.update(np.array([[0.0, 2.0], [0.0, 6.0]]), together=False).tolist() == [[3.0], [4.0]]


@pytest.mark.parametrize("normalise", [False, True])
def test_weights_are_those_of_the_true_logits(normalise: bool) -> None:
    rules = RouterConfig(4, 2, normalise=normalise)
    stock = Router(config(rules), {"layer_00.weight": torch.eye(4)}, torch.device("cpu"))
    router = CachePriorRouter(stock, Cache(2), CachePrior(0.2))
    experts, weights, _ = router.route(0, LOGITS)
    scores = LOGITS.softmax(-1)[0, experts[0]]
    assert experts.tolist() == [[0, 2]]
    assert weights[0].tolist() == pytest.approx((scores / scores.sum() if normalise else scores).tolist())
    assert router.agreement == 0.5
    router.begin()
    assert router.agreement is None


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_by_energy_weights_keep_the_sum_of_the_routers_choice(scoring: Any) -> None:
    """Those that are divided by their sum have it anyway."""
    for normalise in (False, True):
        rules = RouterConfig(4, 2, scoring=scoring, normalise=normalise, scale=1.5)
        stock = Router(config(rules), {"layer_00.weight": torch.eye(4)}, torch.device("cpu"))
        router = CachePriorRouter(stock, Cache(2), CachePrior(0.5, scaling="energy"))
        experts, weights, _ = router.route(0, LOGITS)
        assert experts.tolist() == [[0, 2]]
        assert weights.sum().item() == pytest.approx(stock.route(0, LOGITS).weights.sum().item())
        scores = LOGITS.softmax(-1) if scoring == "softmax" else LOGITS.sigmoid()
        assert (weights[0, 0] / weights[0, 1]).item() == pytest.approx((scores[0, 0] / scores[0, 2]).item())


def test_prompts_are_routed_as_ever() -> None:
    stock = Router(config(RouterConfig(4, 2)), {"layer_00.weight": torch.eye(4)}, torch.device("cpu"))
    router = CachePriorRouter(stock, Cache(2, 3), CachePrior(5.0))
    rows = LOGITS.repeat(3, 1)
    assert router.route(0, rows)[0].tolist() == [[0, 1]] * 3
    assert router.agreement is None


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior")
    export_bundle(make_checkpoint(folder / "checkpoint", "olmoe"), folder / "bundle")
    return folder / "bundle"


def run(bundle: Path, **options: Any) -> tuple[list[int], dict[str, Any]]:
    with Engine.open(bundle, EngineOptions(slots_per_layer=4, context=64, dtype="fp32", **options)) as engine:
        tokens = [token.id for token in engine.generate(IDS, GenerateOptions(12, ignore_eos=True))]
        return tokens, engine.report()


def test_strength_0_is_stock_routing(bundle: Path) -> None:
    stock, report = run(bundle)
    assert (report["routing"], report["route_agreement"]) == ("stock", None)
    tokens, report = run(bundle, routing="cache-prior", prior_strength=0.0)
    assert tokens == stock
    assert report["route_agreement"] == 1.0


def test_a_strong_prior_stays_in_the_cache_and_repeats(bundle: Path) -> None:
    """Four slots, top 3 of 10: with an overwhelming bonus only the true best of a layer can be missing."""
    _, stock = run(bundle)
    first, report = run(bundle, routing="cache-prior", prior_strength=50.0)
    again, _ = run(bundle, routing="cache-prior", prior_strength=50.0)
    assert first == again
    assert report["hit_rate"] >= 2 / 3 > stock["hit_rate"]
    assert report["routing"] == "cache-prior strength=50 top_j=1 scaling=mean"
    assert 1 / 3 <= report["route_agreement"] < 1


def test_routers_change_on_an_open_engine(bundle: Path) -> None:
    with Engine.open(bundle, EngineOptions(slots_per_layer=4, context=64, dtype="fp32")) as engine:
        ask = GenerateOptions(8, ignore_eos=True)
        stock = [token.id for token in engine.generate(IDS, ask)]
        engine.use_router("base", CachePrior(50.0))
        assert engine.options.prior == CachePrior(50.0)
        list(engine.generate(IDS, ask))
        assert engine.summary().route_agreement is not None
        engine.use_router("base")
        assert engine.options.prior is None
        assert [token.id for token in engine.generate(IDS, ask)] == stock
        with pytest.raises(UsageError, match="no router 'chat'"):
            engine.use_router("chat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "nearest"}, "unknown routing 'nearest' \\(known: stock, cache-prior\\)"),
        ({"prior_strength": 0.2}, "need --routing cache-prior"),
        ({"routing": "cache-prior", "prior_strength": -1.0}, "--prior-strength -1.0: expected a number from 0"),
        ({"routing": "cache-prior", "prior_strength": float("nan")}, "--prior-strength nan"),
        ({"routing": "cache-prior", "prior_top_j": 4}, "--prior-top-j 4: expected 0 to 3"),
        ({"routing": "cache-prior", "prior_scaling": "max"}, "unknown prior scaling 'max'"),
    ],
)
def test_impossible_options_are_refused(bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Engine.open(bundle, dataclasses.replace(EngineOptions(slots_per_layer=4), **options))
