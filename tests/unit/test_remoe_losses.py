"""Every term against a plain-Python recomputation of its formula, its gradient, its stop-gradients, and one optimum."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from remoe import losses
from remoe.cache_model import Prior, choose_with_prior, demand_contents, lru_contents, misses
from remoe.objective import LAYER_TERMS, Objective, Routed, combine, layer_terms, routing_numbers
from remoe.pools import PolicyPool
from remoe.routing import as_mask, choose, expert_overlap, log_distribution, weigh
from runtime.cache_prior import CachePrior
from runtime.config import RouterConfig
from runtime.demand import Demand
from runtime.errors import UsageError
from runtime.policies import LRU, make_policy
from runtime.prior_rows import Spread, prefer_cached

ROUTER = RouterConfig(num_experts=6, top_k=2)
SEGMENTS = torch.tensor([3] * 7 + [5] * 4 + [6] + [7] * 3)  # documents of 7, 4, 1 and 3 tokens
STEPS = len(SEGMENTS)
DOCUMENTS = [range(7), range(7, 11), range(11, 12), range(12, 15)]


def logits(seed: int = 0, layers: int = 2) -> torch.Tensor:
    return torch.randn(layers, STEPS, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def top(row: list[float], k: int = 2) -> list[int]:
    return sorted(range(len(row)), key=lambda e: -row[e])[:k]


def pairs(distance: int = 1) -> list[tuple[int, int]]:
    return [(t, t - distance) for d in DOCUMENTS for t in d if t - distance in d]


def sym_kl(p: list[float], q: list[float]) -> float:
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return (kl + sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))) / 2


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def lru_before_each_step(experts: list[list[int]], slots: int) -> list[set[int]]:
    """The running cache's own policy class, a fresh one per document."""
    result: list[set[int]] = []
    for document in DOCUMENTS:
        policy, resident = LRU(), set()
        for t in document:
            result.append(set(resident))
            _use(policy, resident, experts[t], slots)
    return result


def _use(policy: LRU, resident: set[int], experts: list[int], slots: int) -> None:
    missed = [e for e in experts if e not in resident]
    for e in [e for e in experts if e in resident]:
        policy.touch(e)
    for e in missed:
        if len(resident) == slots:
            victim = policy.victim(experts)
            policy.remove(victim)  # type: ignore[arg-type]
            resident.discard(victim)  # type: ignore[arg-type]
        policy.insert(e)
        resident.add(e)


def as_lists(z: torch.Tensor) -> list[list[float]]:
    return z.tolist()


def reuse(z: torch.Tensor) -> float:
    p, experts = [softmax(r) for r in as_lists(z)], [top(r) for r in as_lists(z)]
    return -math.log(mean([sum(p[t][e] for e in experts[s]) / 2 for t, s in pairs()]) + 1e-8)


def reuse_of_cache(z: torch.Tensor) -> float:
    p, experts = [softmax(r) for r in as_lists(z)], [top(r) for r in as_lists(z)]
    held = lru_before_each_step(experts, 3)
    return -math.log(mean([sum(p[t][e] for e in held[t]) / 2 for t, _ in pairs()]) + 1e-8)


def smooth(z: torch.Tensor) -> float:
    p = [softmax(r) for r in as_lists(z)]
    return mean([sym_kl(p[t], p[s]) for t, s in pairs()])


def lag(z: torch.Tensor) -> float:
    p = [softmax(r) for r in as_lists(z)]
    return mean([mean([sym_kl(p[t], p[s]) for t, s in pairs(d)]) for d in (1, 2, 4)])  # 8 and 16 fit no document


def window(z: torch.Tensor) -> float:
    p, total = [softmax(r) for r in as_lists(z)], 0.0
    for document in DOCUMENTS:
        for start in range(document.start, document.stop, 3):
            block = p[start : min(start + 3, document.stop)]
            q = [mean([row[e] for row in block]) for e in range(6)]
            total += len(block) * -sum(x * math.log(x) for x in q)
    return total / STEPS


def trust(z: torch.Tensor, reference: torch.Tensor) -> float:
    total = 0.0
    for new, old in zip(as_lists(z), as_lists(reference), strict=True):
        total += sum(a * math.log(a / b) for a, b in zip(softmax(new), softmax(old), strict=True))
    return total / STEPS


def margin(z: torch.Tensor) -> float:
    experts = [top(r) for r in as_lists(z)]
    held, total = lru_before_each_step(experts, 3), 0.0
    for t, _ in pairs():
        row = as_lists(z)[t]
        wanted = sorted(row[e] for e in experts[t] if e not in held[t])
        ready = sorted((row[e] for e in held[t] if e not in experts[t]), reverse=True)
        for u, v in list(zip(wanted, ready, strict=False))[:2]:
            total += max(0.0, u - v + 0.1) if u - v <= 1.5 else 0.0
    return total / len(pairs())


def miss(z: torch.Tensor) -> float:
    experts = [top(r) for r in as_lists(z)]
    held, total = lru_before_each_step(experts, 3), 0.0
    for t, _ in pairs():
        row = as_lists(z)[t]
        theta = sum(sorted(row, reverse=True)[1:3]) / 2
        for e in range(6):
            side = -1 if e in held[t] else 1
            total += 1 / (1 + math.exp(-side * (row[e] - theta) / 0.4)) / 4
    return total / len(pairs())


def chosen(z: torch.Tensor) -> torch.Tensor:
    return as_mask(choose(ROUTER, z, None), 6)


def held(z: torch.Tensor) -> torch.Tensor:
    return lru_contents(choose(ROUTER, z, None), SEGMENTS, 6, 3)


TERMS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], float]]] = {
    "reuse": (
        lambda z: losses.reuse_loss(z.softmax(-1), losses.previous_sets(chosen(z)), SEGMENTS, 2),
        reuse,
    ),
    "reuse of a cache": (lambda z: losses.reuse_loss(z.softmax(-1), held(z), SEGMENTS, 2), reuse_of_cache),
    "smooth": (lambda z: losses.smooth_loss(z.log_softmax(-1), SEGMENTS), smooth),
    "lag": (lambda z: losses.lag_loss(z.log_softmax(-1), SEGMENTS), lag),
    "window": (lambda z: losses.window_loss(z.softmax(-1), SEGMENTS, 3), window),
    "margin": (lambda z: losses.margin_loss(z, chosen(z), held(z), SEGMENTS, 0.1, 1.5, 2), margin),
    "miss": (lambda z: losses.miss_loss(z, held(z), SEGMENTS, 2, 0.4), miss),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_term_is_its_formula(name: str, seed: int) -> None:
    function, formula = TERMS[name]
    z = logits(seed)
    assert function(z).tolist() == pytest.approx([formula(layer) for layer in z], rel=1e-9)


@pytest.mark.parametrize("name", TERMS)
def test_a_term_has_the_right_gradient(name: str) -> None:
    function, _ = TERMS[name]
    z = logits(4).requires_grad_()
    if name == "miss":  # its boundary is a constant: what a difference quotient must not move
        boundary = z.detach().topk(3).values[..., 1:].mean(-1, keepdim=True)
        side, valid = torch.where(held(z), -1.0, 1.0), losses.same_document(SEGMENTS, 1)
        wanted = (side * (z - boundary) / 0.4).sigmoid().sum(-1)[..., valid].mean(-1) / 4
        assert torch.equal(*(torch.autograd.grad(value.sum(), z)[0] for value in (wanted, function(z))))
    else:
        assert torch.autograd.gradcheck(lambda x: function(x), (z,))
    assert torch.autograd.grad(function(z).sum(), z)[0].abs().sum() > 0


def test_trust_is_its_formula_and_leaves_the_reference_alone() -> None:
    z, reference = logits(1).requires_grad_(), logits(2).requires_grad_()
    value = losses.trust_loss(z.log_softmax(-1), reference.log_softmax(-1))
    assert value.tolist() == pytest.approx([trust(a, b) for a, b in zip(z, reference, strict=True)], rel=1e-9)
    assert torch.autograd.gradcheck(lambda x: losses.trust_loss(x.log_softmax(-1), logits(2).log_softmax(-1)), (z,))
    value.sum().backward()
    assert reference.grad is None
    assert z.grad is not None and z.grad.abs().sum() > 0


def test_the_set_of_reuse_carries_no_gradient_and_smooth_reaches_both_steps() -> None:
    """Two steps of one document: with a hard set only the later step feels reuse, both feel smoothness."""
    z = logits()[:1, :2].clone().requires_grad_()
    segments = torch.zeros(2, dtype=torch.int64)
    sets = losses.previous_sets(as_mask(choose(ROUTER, z, None), 6))
    (gradient,) = torch.autograd.grad(losses.reuse_loss(z.softmax(-1), sets, segments, 2).sum(), z)
    assert gradient[0, 0].abs().sum() == 0
    assert gradient[0, 1].abs().sum() > 0
    (gradient,) = torch.autograd.grad(losses.smooth_loss(z.log_softmax(-1), segments).sum(), z)
    assert (gradient.abs().sum(-1) > 0).all()


def test_reuse_by_hand() -> None:
    """P = .4 .3 .2 .1 twice, K = 2: the set {0, 1} holds .7, so m = .35. The log is of the mean, not a mean of logs."""
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]).double()
    sets = losses.previous_sets(as_mask(p.topk(2).indices, 4))
    assert losses.reuse_loss(p, sets, torch.zeros(3), 2).item() == pytest.approx(-math.log((0.35 + 0.15) / 2))


def test_steps_of_other_documents_do_not_count() -> None:
    z = logits()
    single = torch.arange(STEPS)  # every token its own document
    for name in ("reuse", "smooth", "lag"):
        objective = Objective(ce=0, trust=0, **{n: float(n == name) for n in ("reuse", "smooth", "lag", "window")})
        terms = layer_terms(objective, ROUTER, routed(z, segments=single))
        assert terms[name].tolist() == [0.0, 0.0]
    assert not held(z)[:, [d.start for d in DOCUMENTS]].any()  # a document starts with an empty cache


def routed(z: torch.Tensor, reference: torch.Tensor | None = None, segments: torch.Tensor = SEGMENTS) -> Routed:
    return Routed(z, logits(9) if reference is None else reference, choose(ROUTER, z, None), None, segments)


@pytest.mark.parametrize("slots", [2, 3, 4, 5, 6])
def test_the_modelled_cache_is_the_running_caches_policy(slots: int) -> None:
    for seed in range(20):
        experts = choose(ROUTER, logits(seed, 1), None)
        wanted = lru_before_each_step(experts[0].tolist(), slots)
        content = lru_contents(experts, SEGMENTS, 6, slots)[0]
        assert [set(row.nonzero()[:, 0].tolist()) for row in content] == wanted
        missed = [sum(e not in w for e in row) for row, w in zip(experts[0].tolist(), wanted, strict=True)]
        assert misses(experts, content[None])[0].tolist() == missed


def test_overlap_by_hand() -> None:
    experts = torch.tensor([[0, 1], [1, 2], [1, 2], [3, 4], [3, 5]])
    segments = torch.tensor([0, 0, 0, 1, 1])  # overlaps 1, 2 and 1 of 2
    assert expert_overlap(as_mask(experts, 6), segments).item() == pytest.approx(4 / 6)


def test_the_prior_prefers_what_is_cached() -> None:
    """max z - min z is 4, 4, 4 and 9: the running mean D is 4 three times, then 21 / 4."""
    z = torch.tensor([[4.0, 3, 0, 0, 0, 0], [0, 0, 0, 3, 4, 1], [0, 2.5, 0, 3, 4, 0], [9, 0, 8, 0, 0, 0]])
    segments = torch.zeros(4, dtype=torch.int64)

    def experts(strength: float, top_j: int = 1, scaling: str = "mean") -> list[list[int]]:
        prior = Prior(CachePrior(strength, top_j, scaling), 2)  # type: ignore[arg-type]
        return choose_with_prior(ROUTER, z, None, segments, prior).tolist()

    assert experts(0.0) == choose(ROUTER, z, None).tolist() == [[0, 1], [4, 3], [4, 3], [0, 2]]
    # Bonus 3.2: expert 4, the true best, keeps its place; the cached 0 and 1 rise to 3.2 and beat expert 3.
    # Then {4, 0} is cached: 4 stays, 0 rises to 3.2 again. At last 0 leads and 2 is far ahead of the cached 4.
    assert experts(0.8) == [[0, 1], [4, 0], [4, 0], [0, 2]]
    # Without the guard 0 and 1 at 4.4 beat 4 and 3 (4 and 3), then 1 with 2.5 + 4.4 leads, and 0 with 4.4 follows.
    assert experts(1.1, top_j=0) == [[0, 1], [0, 1], [1, 0], [0, 2]]
    # By the token's own spread (1, 1, 1, 1) nothing changes: 1 is too little to pass expert 3.
    assert experts(1.1, scaling="token") == [[0, 1], [4, 3], [4, 3], [0, 2]]
    weights = weigh(ROUTER, z[1:2], torch.tensor([[4, 0]]))[0]
    assert weights.tolist() == pytest.approx(z[1].softmax(-1)[[4, 0]].tolist())  # the original logits weigh


@pytest.mark.parametrize("scaling", ["mean", "token", "energy"])
@pytest.mark.parametrize(
    "router",
    [ROUTER, RouterConfig(6, 2, scoring="sigmoid", normalise=True, num_groups=3, top_groups=2, choice_bias=True)],
    ids=["softmax", "sigmoid"],
)
def test_the_prior_is_the_engines_rule(router: RouterConfig, scaling: str) -> None:
    """The engine's own function and policy class, one token after another, a fresh cache per document."""
    z = logits(3, 1)[0].float()
    bias = torch.linspace(-0.1, 0.1, 6) if router.choice_bias else None
    bias_row = None if bias is None else bias.numpy()
    options = CachePrior(0.5, 1, scaling)  # type: ignore[arg-type]
    wanted = []
    for document in DOCUMENTS:
        policy, resident, spread = LRU(), set(), Spread()
        for t in document:
            cached, row = np.array([[e in resident for e in range(6)]]), z[t : t + 1].numpy()
            full = np.array([[len(resident) == 3]])
            experts, _, _ = prefer_cached(options, router, row, bias_row, cached, full, spread.update(row))
            wanted.append(experts[0].tolist())
            _use(policy, resident, wanted[-1], 3)
    assert choose_with_prior(router, z, bias, SEGMENTS, Prior(options, 3)).tolist() == wanted
    assert wanted != choose(router, z, bias).tolist()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_contents_by_demand_are_the_simulators(scoring: str) -> None:
    """The engine's demand and the simulator's slots, a fresh cache per document."""
    router = RouterConfig(6, 2, scoring=scoring)  # type: ignore[arg-type]
    z = logits(3, 1)[0].float()
    experts = choose(router, z, None)
    wanted, prior, with_prior = [], CachePrior(0.1, scaling="energy"), []
    for document in DOCUMENTS:
        pools = []
        for _ in range(2):
            demand = Demand(1, router)
            pools.append((demand, PolicyPool(3, make_policy("gate", range(6), demand.values[0]))))
        spread = Spread()
        for t in document:
            row = z[t : t + 1].numpy()
            wanted.append([e in pools[0][1].resident for e in range(6)])
            cached = np.array([[e in pools[1][1].resident for e in range(6)]])
            full = np.array([[pools[1][1].full]])
            leaning = prefer_cached(prior, router, row, None, cached, full, spread.update(row)).experts
            with_prior.append(leaning[0].tolist())
            for (demand, pool), chosen in zip(pools, (experts[t : t + 1].numpy(), leaning), strict=True):
                demand.see(0, row, chosen)
                pool.request(chosen[0].tolist())
    assert demand_contents(router, z, experts, SEGMENTS, 3).tolist() == wanted
    assert choose_with_prior(router, z, None, SEGMENTS, Prior(prior, 3, "gate")).tolist() == with_prior


def test_sigmoid_gates_have_a_distribution_too() -> None:
    router = RouterConfig(6, 2, scoring="sigmoid")
    z = logits()
    p = log_distribution(router, z).exp()
    assert torch.allclose(p, z.sigmoid() / z.sigmoid().sum(-1, keepdim=True))
    assert torch.allclose(log_distribution(ROUTER, z, 3.0), (3 * z).log_softmax(-1))


def test_the_sum_weighs_layers_ramps_locality_and_skips_what_is_off() -> None:
    objective = Objective(ce=0, trust=0.5, reuse=2.0, smooth=0.0, lag=0.0, window=0.0, layer_strength=(1.0, 3.0))
    terms = layer_terms(objective, ROUTER, routed(logits()))
    assert set(terms) == {"trust", "reuse"}
    value = combine(objective, terms, alpha=0.25)
    wanted = [0.5 * terms["trust"][n] + 0.25 * 2.0 * s * terms["reuse"][n] for n, s in ((0, 1.0), (1, 3.0))]
    assert value.item() == pytest.approx(float(sum(wanted)) / 2)
    assert [Objective(warmup_steps=4).alpha(step) for step in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0]
    everything = Objective(ce=0, margin=1.0, miss=1.0)
    assert set(layer_terms(everything, ROUTER, routed(logits()))) == set(LAYER_TERMS)


def test_the_boundary_terms_go_by_what_the_choice_went_by() -> None:
    """The rows of the test above: each bonus added by hand, 3.2 three times, then 0.8 * 21 / 4."""
    z = torch.tensor([[4.0, 3, 0, 0, 0, 0], [0, 0, 0, 3, 4, 1], [0, 2.5, 0, 3, 4, 0], [9, 0, 8, 0, 0, 0]])
    biased = [[7.2, 3, 0, 0, 0, 0], [3.2, 3.2, 0, 3, 7.2, 1], [3.2, 2.5, 0, 3, 7.2, 0], [13.2, 0, 8, 0, 4.2, 0]]
    held = as_mask(torch.tensor([[0, 0], [0, 1], [4, 0], [4, 0]]), 6)
    held[0] = False
    one = torch.zeros(4, dtype=torch.int64)
    experts = torch.tensor([[0, 1], [4, 0], [4, 0], [0, 2]])
    gate = z[None].clone().requires_grad_()
    given = Routed(gate, z[None], experts[None], None, one)
    objective = Objective(ce=0, trust=0, reuse=0, smooth=0, lag=0, window=0, miss=1.0, prior=0.8, cache_slots=2)
    miss = layer_terms(objective, ROUTER, given)["miss"]
    values = torch.tensor([biased]) / z.std(-1).mean()
    assert miss.tolist() == pytest.approx(losses.miss_loss(values, held[None], one, 2, 0.25).tolist())
    miss.sum().backward()
    assert gate.grad is not None
    assert bool((gate.grad[0, 1, :2] < 0).all())  # cached: more of them is fewer misses
    assert float(gate.grad[0, 1, 3]) > 0


BAD: dict[str, tuple[dict, str]] = {
    "negative": ({"trust": -1.0}, "trust is not a number from 0"),
    "nan": ({"reuse": math.nan}, "reuse is not a number from 0"),
    "no terms": ({"ce": 0.0, "trust": 0.0, "reuse": 0.0, "smooth": 0.0, "lag": 0.0, "window": 0.0}, "nothing to tune"),
    "small cache": ({"cache_slots": 1}, "below the 2 experts of one token"),
    "strengths": ({"layer_strength": (1.0,)}, "1 values for 2 MoE layers"),
    "lags": ({"lags": (0,)}, "not positive"),
    "window": ({"window_size": 1}, "not above 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_objectives_name_the_setting(name: str) -> None:
    change, words = BAD[name]
    with pytest.raises(UsageError, match=words):
        Objective(**change).check(ROUTER, 2)
    with pytest.raises(UsageError, match="chooses all"):
        Objective().check(dataclasses.replace(ROUTER, top_k=6), 2)


LOCAL = {"reuse": 0.0, "smooth": 0.0, "lag": 0.0, "window": 0.0}


@pytest.mark.parametrize(
    "terms",
    [{**LOCAL, "reuse": 1.0, "smooth": 1.0, "lag": 1.0}, {**LOCAL, "margin": 1.0}, {**LOCAL, "miss": 1.0}],
    ids=str,
)
def test_free_logits_reach_the_known_optimum(terms: dict[str, float]) -> None:
    """Without trust or a model nothing speaks against locality: every document ends with one set of experts, so the
    overlap is 1 and each document misses its K first experts and no more."""
    objective = Objective(ce=0, trust=0, warmup_steps=0, margin_reach=math.inf, miss_softness=2.0, **terms)
    z = logits(7, 1).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        combine(objective, layer_terms(objective, ROUTER, routed(z, logits(7, 1))), 1.0).backward()
        optimizer.step()
    numbers = routing_numbers(ROUTER, routed(z.detach(), logits(7, 1)), 2)
    assert numbers["eor"] == 1.0
    assert numbers["misses_per_token"] == pytest.approx(2 * len(DOCUMENTS) / STEPS)


def test_trust_alone_brings_the_gates_back() -> None:
    reference = logits(1, 1)
    z = logits(2, 1).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        losses.trust_loss(z.log_softmax(-1), reference.log_softmax(-1)).sum().backward()
        optimizer.step()
    assert torch.allclose(z.detach().softmax(-1), reference.softmax(-1), atol=1e-3)
