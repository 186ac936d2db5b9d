"""Tunable gates in transformers models: the same routing as stock, in every family, and nothing else has a gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from export.families import parse_config
from export.source import read_config
from remoe.cache_model import Prior
from remoe.gates import Gate, Gates, Tape, decision, find_gate
from remoe.head import IGNORED, head_losses
from remoe.objective import Objective, combine, layer_terms
from remoe.texts import batch, pack
from remoe.tune import last_hidden
from runtime.cache_prior import CachePrior
from runtime.config import ModelConfig, RouterConfig
from runtime.errors import CheckpointError, UsageError
from runtime.layout import router_tensors
from tests.checkpoints import FAMILIES, load_reference, make_checkpoint

DOCUMENTS = [list(range(5, 19)), list(range(30, 37)), list(range(60, 90))]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelConfig]:
    path = make_checkpoint(tmp_path_factory.mktemp(request.param) / "ck", request.param)
    return load_reference(path), parse_config(read_config(path))


def test_installed_gates_route_as_the_family_does(loaded: tuple[Any, ModelConfig]) -> None:
    model, config = loaded
    ids = torch.arange(3, 43)[None]
    stock = [getattr(*find_gate(model, config, layer)) for layer in config.moe_layers]
    seen: list[tuple[torch.Tensor, ...]] = []
    hooks = [gate.register_forward_hook(lambda m, i, o: seen.append((i[0], *decision(o)))) for gate in stock]
    with torch.no_grad():
        wanted = model(ids).logits
    gates = Gates(model, config)
    with gates.installed(), torch.no_grad():
        with gates.recorded(Tape(torch.zeros(40, dtype=torch.int64))) as tape:
            found = model(ids).logits
        for hook in hooks:
            hook.remove()
        for gate, (h, logits, weights, experts) in zip(gates.modules, seen, strict=True):
            ours = decision(gate(h))
            torch.testing.assert_close(ours[0], logits)
            order = experts.argsort(-1)  # DeepSeek does not sort
            assert ours[2].sort(-1).values.equal(experts.gather(-1, order))
            torch.testing.assert_close(ours[1].gather(-1, ours[2].argsort(-1)), weights.gather(-1, order))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    routed = gates.routed(tape)
    assert routed.logits.equal(routed.reference)
    assert routed.experts.shape == (len(config.moe_layers), 40, config.router.top_k)
    assert [getattr(*find_gate(model, config, layer)) for layer in config.moe_layers] == stock  # put back
    assert {n: tuple(t.shape) for n, t in gates.tensors().items()} == router_tensors(config)


class Stock(torch.nn.Module):
    """A gate whose forward returns its outputs in another order, or others."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(4))
        self.order = order

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = h @ self.weight.T
        found = logits.softmax(-1).topk(2)
        return tuple((logits, found.values, found.indices)[i] for i in self.order)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_a_gate_answers_in_the_order_of_the_one_it_replaces(order: tuple[int, ...]) -> None:
    """GraniteMoe's experts moved from the first place to the last between two releases of transformers."""
    stock, h = Stock(order), torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    found = Gate(RouterConfig(4, 2), stock, 0)(h)
    for ours, wanted in zip(found, stock(h), strict=True):
        torch.testing.assert_close(ours, wanted)
    assert decision(found)[2].tolist() == [[1, 3]]


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (2, 1, 2)])
def test_a_gate_that_answers_otherwise_is_refused(order: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="expected logits, weights and experts: this version of transformers"):
        Gate(RouterConfig(4, 2), Stock(order), 0)


def test_a_gate_with_the_rule_by_energy_weighs_as_the_engine_does() -> None:
    """Two cached experts, the second token stays with them, and the sum of its weights is that of its own choice."""
    stock, h = Stock((0, 1, 2)), torch.tensor([[1.0, 4.0, 2.0, 3.0], [3.0, 4.0, 1.0, 2.9]])
    own = stock(h)
    gate = Gate(RouterConfig(4, 2), stock, 0)
    gate.tape = Tape(torch.zeros(2, dtype=torch.int64), Prior(CachePrior(0.5, scaling="energy"), 2))
    logits, weights, experts = gate(h)
    assert (own[2].tolist(), experts.tolist()) == ([[1, 3], [1, 0]], [[1, 3], [1, 3]])
    torch.testing.assert_close(weights.sum(-1), own[1].sum(-1))
    torch.testing.assert_close(logits, own[0])


def test_a_gradient_reaches_every_gate_and_nothing_else(loaded: tuple[Any, ModelConfig]) -> None:
    model, config = loaded
    given = batch(pack(DOCUMENTS, 25, config.vocab_size), [0, 1])
    gates = Gates(model, config)
    for head_only in (True, False):
        with gates.installed():
            with gates.recorded(Tape(given.segments.flatten())) as tape:
                hidden = last_hidden(model, given)
            if head_only:
                weight = model.get_output_embeddings().weight
                loss = head_losses(hidden, weight, given.targets.flatten(), None, 1.0, 0.0, config.logits_scale).total
            else:
                objective = Objective(ce=0.0, margin=1.0, miss=1.0, hidden_gradient=False)
                with torch.no_grad():
                    for gate in gates.modules:
                        gate.weight.add_(0.01)
                tape.hidden = [torch.randn(50, config.hidden_size) for _ in gates.modules]
                loss = combine(objective, layer_terms(objective, config.router, gates.routed(tape, False)), 1.0)
            loss.backward()
            assert all(p.grad is None for p in model.parameters() if all(p is not g for g in gates.parameters()))
        assert all(g.grad is not None and g.grad.abs().sum() > 0 for g in gates.parameters())
        gates.reset()
    assert all(p.requires_grad for p in model.parameters())  # as it was


def test_attention_and_losses_stay_within_documents(loaded: tuple[Any, ModelConfig]) -> None:
    """The packed sequence gives each document the hidden states that it has alone."""
    model, config = loaded
    given = batch(pack(DOCUMENTS, 51, config.vocab_size), [0])
    assert given.positions[0].tolist() == [*range(14), *range(7), *range(30)]
    assert given.targets[0].tolist() == [*range(6, 19), IGNORED, *range(31, 37), IGNORED, *range(61, 90), IGNORED]
    with torch.no_grad():
        packed = last_hidden(model, given).split([14, 7, 30])
        for document, part in zip(DOCUMENTS, packed, strict=True):
            alone = model.model(input_ids=torch.tensor([document])).last_hidden_state[0]
            torch.testing.assert_close(part, alone, rtol=2e-4, atol=2e-4)


def test_the_head_gives_the_models_own_loss_and_gradient(loaded: tuple[Any, ModelConfig]) -> None:
    model, config = loaded
    ids = torch.arange(3, 53)[None]
    weight = model.get_output_embeddings().weight.detach()
    hidden = model.model(input_ids=ids).last_hidden_state[0].detach().requires_grad_()
    taught = (hidden + 0.3).detach()
    targets = torch.cat([ids[0, 1:], torch.tensor([IGNORED])])
    losses = head_losses(hidden, weight, targets, taught, 0.7, 2.0, config.logits_scale)
    with torch.no_grad():
        assert losses.ce == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(3.0 * losses.total, hidden)
    logits, other = (config.logits_scale * (x @ weight.T)[:-1] for x in (hidden, taught))
    kl = torch.nn.functional.kl_div(
        logits.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    total = 0.7 * torch.nn.functional.cross_entropy(logits, targets[:-1]) + 2.0 * kl
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-5)
    assert losses.kl == pytest.approx(kl.item(), rel=1e-4)
    assert losses.agreement == pytest.approx(float((logits.argmax(-1) == other.argmax(-1)).double().mean()))
    torch.testing.assert_close(gradient, torch.autograd.grad(3.0 * total, hidden)[0], rtol=1e-4, atol=1e-7)


def test_gates_of_another_shape_are_refused(loaded: tuple[Any, ModelConfig]) -> None:
    model, config = loaded
    gates = Gates(model, config)
    tensors = gates.tensors()
    gates.load(tensors)
    name = sorted(tensors)[0]
    with pytest.raises(UsageError, match=f"{name} is missing, extra or of another shape"):
        gates.load({**tensors, name: torch.zeros(2, 2)})


def test_a_model_that_is_not_the_config_is_refused(tmp_path: Path) -> None:
    model = load_reference(make_checkpoint(tmp_path / "ck", "olmoe"))
    config = parse_config(read_config(make_checkpoint(tmp_path / "other", "olmoe", num_experts=12)))
    with pytest.raises(CheckpointError, match=r"layer 0 of OlmoeForCausalLM: 0 modules look like a gate \[12, 64\]"):
        Gates(model, config)
