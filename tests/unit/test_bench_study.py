"""The study of tuning methods: it counts what the simulator counts, and its verdict compares like with like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.study.measure import Bench, mean_error
from bench.study.methods import Strengths, methods
from bench.study.page import Row, fewest_misses, rows, write_page
from export.families import parse_config
from export.source import read_config
from remoe.gates import Gates
from remoe.texts import Sequences, pack
from runtime.cache_prior import CachePrior
from tests.checkpoints import load_reference, make_checkpoint

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
SLOTS = (2, 4, 8)


@pytest.fixture(scope="module")
def text() -> Sequences:
    generator = torch.Generator().manual_seed(5)
    return pack([torch.randint(0, 64, (n,), generator=generator).tolist() for n in (30, 50, 16)], 48, 64)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, text: Sequences) -> Bench:
    path = make_checkpoint(tmp_path_factory.mktemp("study") / "ck", "qwen2_moe", gate_std=1.0, **SMALL)
    return Bench(Gates(load_reference(path), parse_config(read_config(path))), text, SLOTS)


def test_stock_router(bench: Bench, text: Sequences) -> None:
    """Against itself nothing changes; with a slot per expert each document reads every expert it meets once."""
    found = bench.measure(bench.gates.tensors(stock=True))
    assert found.quality[2].kl == pytest.approx(0.0, abs=1e-9)
    assert found.quality[2].agreement == 1.0
    assert found.quality[2].perplexity_error == pytest.approx(0.0, abs=1e-6)
    assert found.misses[2] > found.misses[4] > found.misses[8]
    assert all(found.optimum[c] <= found.misses[c] + 1e-12 for c in SLOTS)
    documents = int(sum(len(row.unique()) for row in text.segments))
    assert found.misses[8] == found.optimum[8] <= documents * 8 / text.tokens
    # K slots: only the experts of the token before are there, so misses are what the overlap leaves
    firsts = documents / text.tokens
    assert found.misses[2] == pytest.approx(2 * (firsts + (1 - firsts) * (1 - found.quality[2].eor)), rel=0.05)


def test_cache_prior_reads_less_and_changes_the_output(bench: Bench) -> None:
    stock = bench.measure(bench.gates.tensors(stock=True))
    prior = bench.measure(bench.gates.tensors(stock=True), CachePrior(0.3))
    for slots in (2, 4):
        assert prior.misses[slots] < 0.9 * stock.misses[slots]
        assert prior.quality[slots].kl > 0
        assert 0 < prior.quality[slots].perplexity_error < prior.quality[slots].perplexity / stock.quality[2].perplexity
    assert prior.quality[2] != prior.quality[4]  # the routing depends on what is cached


def test_the_error_of_a_mean_is_that_of_its_parts() -> None:
    counts, generator = torch.full((4000,), 5.0), torch.Generator().manual_seed(1)
    sums = 2 * torch.randn(4000, generator=generator) + 3
    assert mean_error(sums, counts) == pytest.approx(2 / 5 / 4000**0.5, rel=0.05)
    assert mean_error(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0])) == 0  # the same mean in both


def test_the_gate_aware_cache_changes_misses_and_nothing_else(bench: Bench) -> None:
    stock = bench.gates.tensors(stock=True)
    lru, gate = bench.measure(stock), bench.measure(stock, policy="gate")
    assert gate.quality[4] == lru.quality[4]
    assert (gate.misses[2], gate.misses[8]) == (lru.misses[2], lru.misses[8])  # K slots, or all: nobody has a choice
    assert lru.optimum[4] < gate.misses[4] != lru.misses[4]


def test_every_method_is_named_once_and_tunes_something() -> None:
    strengths = Strengths(
        remoe=(0.1, 1.0),
        openings=(0.1, 1.0),
        miss=(1.0,),
        prior=(0.1, 0.2),
        energy=(0.05,),
        active=(0.2,),
        after=(0.1,),
    )
    found = list(methods(strengths, (2, 4), 3))
    assert len({method.key for method in found}) == len(found)
    by_name = {method.name: method for method in found}
    ce_only, published = by_name["CE only"].objective, by_name["ReMoE"].objective
    assert ce_only is not None
    assert published is not None
    assert (ce_only.ce, ce_only.trust, ce_only.reuse, ce_only.smooth, ce_only.lag, ce_only.window) == (1, 0, 0, 0, 0, 0)
    assert published.reuse > 0 < published.trust
    early = by_name["ReMoE, stronger in early layers"].objective
    assert early is not None
    assert early.layer_strength == (1.5, 1.0, 0.5)
    rules = {method.name: method.prior for method in found if method.objective is None and method.prior}
    prior, energy = CachePrior(0.2), CachePrior(0.05, scaling="energy")
    assert rules == {
        "cache-prior": prior,
        "cache-prior, gate-aware cache": prior,
        "by energy": energy,
        "by energy, gate-aware cache": energy,
    }


def _point(
    method: str, perplexity: float, missed: float, seed: int = 0, tuned_for: int = 0, eor: float = 0.3
) -> dict[str, Any]:
    quality = {"perplexity": perplexity, "perplexity_error": 0.01, "kl": 0.01, "agreement": 0.9, "eor": eor}
    return {
        "method": method,
        "strength": 1.0,
        "tuned_for": tuned_for,
        "seed": seed,
        "quality": {"4": quality},
        "misses": {"4": missed},
        "optimum": {"4": missed / 2},
    }


def test_rows_average_seeds_and_take_the_router_tuned_for_the_nearest_size() -> None:
    points = [_point("ReMoE", 10.0, 2.0), _point("ReMoE", 12.0, 3.0, seed=1)]
    points += [_point("miss", 10.0, 1.0, tuned_for=4), _point("miss", 10.0, 9.0, tuned_for=16)]
    remoe, miss = rows(points, 4)
    assert (remoe.perplexity, remoe.misses, remoe.lowest_misses, remoe.highest_misses, remoe.seeds) == (
        11,
        2.5,
        2,
        3,
        2,
    )
    assert (miss.misses, miss.optimum) == (1.0, 0.5)


def test_rows_stand_by_method_and_strength_whatever_the_order_of_the_points() -> None:
    points = [_point(name, 10.0, 1.0) for name in ("stock", "ReMoE", "miss", "ReMoE")]
    points[1]["strength"] = 3.0
    assert [(row.method, row.strength) for row in rows(points, 4)] == [
        ("stock", 1.0), ("ReMoE", 1.0), ("ReMoE", 3.0), ("miss", 1.0)
    ]  # fmt: skip


def _row(strength: float, perplexity: float, missed: float) -> Row:
    return Row("m", strength, 4, 1, perplexity, 0.0, 0.01, 0.9, 0.3, missed, 0.0, missed, missed)


def test_reading_off_by_hand() -> None:
    """From 10 to 12 misses fall by 4: at 10.5 a quarter of the way. Later points count where they are cheap again."""

    def perplexity(row: Row) -> float:
        return row.perplexity

    line = [_row(0.0, 10.0, 8.0), _row(1.0, 12.0, 4.0)]
    assert fewest_misses(line, perplexity, 10.5) == 7.0
    assert fewest_misses(line, perplexity, 12.0) == fewest_misses(line, perplexity, 99.0) == 4.0
    assert fewest_misses(line, perplexity, 9.9) is None
    assert fewest_misses([*line, _row(2.0, 10.0, 2.0)], perplexity, 11.0) == 2.0


def test_verdict_by_hand(tmp_path: Path) -> None:
    """ReMoE saves 10 % at +0.5 %. The prior reaches 40 % at +1 %, so half of that here; the best one has two seeds."""
    points = [_point("stock", 10.0, 2.0), _point("ReMoE", 10.05, 1.8, eor=0.38), _point("cache-prior", 10.1, 1.2)]
    points += [
        _point("ReMoE without Trust", 10.05, 1.0),
        _point("ReMoE without Trust", 10.05, 0.8, seed=1),
    ]
    points[0]["strength"] = 0.0
    write_page(points, 2, 5_000_000, tmp_path)
    page = (tmp_path / "study.md").read_text()
    assert "### 4 slots per layer (2.0 K)" in page
    assert "### At ReMoE's perplexity, 10.05" in page
    assert "| cache-prior | -20.0%, 2.0 x |" in page
    assert "| 1.200 | -40.0% | 6 | 50% |" in page  # of cache-prior: 1.2 misses in each layer, 5 MB for all layers
    assert "| ReMoE without Trust | -55.0% (-50.0% to -60.0%), 5.5 x |" in page
    assert (tmp_path / "study.png").stat().st_size > 5000


def test_without_the_published_gain_remoe_stands_where_it_is_affordable(tmp_path: Path) -> None:
    points = [_point("stock", 10.0, 2.0), _point("ReMoE", 10.05, 1.8, eor=0.31), _point("ReMoE", 10.2, 1.5, eor=0.32)]
    points[2]["strength"] = 2.0
    write_page(points, 2, 5_000_000, tmp_path)
    page = (tmp_path / "study.md").read_text()
    assert page.startswith("No strength of ReMoE that was tried has the published gain of EOR. It stands here at 1, ")
    assert "### At ReMoE's perplexity, 10.05" in page


def test_without_remoe_there_is_no_verdict(tmp_path: Path) -> None:
    write_page([_point("stock", 10.0, 2.0), _point("cache-prior", 10.05, 1.8)], 2, 5_000_000, tmp_path)
    assert (tmp_path / "study.md").read_text().startswith("ReMoE was not run")
