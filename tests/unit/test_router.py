"""The router's steps on logits that can be checked by hand: the gate is the identity, so h is the logits."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from runtime.config import AttentionConfig, ModelConfig, RopeConfig, RouterConfig
from runtime.router import Router

LOGITS = torch.tensor([[0.0, math.log(4), math.log(2), math.log(3)]])  # softmax: .1 .4 .2 .3


def config(router: RouterConfig) -> ModelConfig:
    """A model whose only interesting part is its router."""
    return ModelConfig(
        family="test",
        vocab_size=8,
        hidden_size=router.num_experts,
        num_layers=1,
        max_context=16,
        norm_eps=1e-6,
        activation="silu",
        attention=AttentionConfig("gqa", 1, 1, 4, 4, 4, 0.5),
        rope=RopeConfig(dim=4, theta=10000.0),
        router=router,
        moe_layers=(0,),
        expert_intermediate_size=4,
    )


def route(router: RouterConfig, logits: torch.Tensor = LOGITS, bias: list[float] | None = None):  # type: ignore[no-untyped-def]
    tensors = {"layer_00.weight": torch.eye(router.num_experts)}
    if bias is not None:
        tensors["layer_00.choice_bias"] = torch.tensor(bias)
    experts, weights, _ = Router(config(router), tensors, torch.device("cpu")).route(0, logits)
    return experts[0].tolist(), weights[0].tolist()


def test_softmax_top_k_keeps_the_probabilities() -> None:
    experts, weights = route(RouterConfig(4, 2))
    assert experts == [1, 3]
    assert weights == pytest.approx([0.4, 0.3])


def test_normalise_then_scale() -> None:
    experts, weights = route(RouterConfig(4, 2, normalise=True, scale=2.5))
    assert experts == [1, 3]
    assert weights == pytest.approx([2.5 * 4 / 7, 2.5 * 3 / 7])


def test_sigmoid_with_a_bias_that_only_chooses() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]])
    experts, weights = route(RouterConfig(4, 2, scoring="sigmoid", choice_bias=True), logits, [0.0, 0.0, 9.0, 0.0])
    assert experts == [2, 1]
    assert weights == pytest.approx([1 / (1 + math.e), 1 / (1 + math.exp(-1))])


def test_groups_limit_the_choice() -> None:
    groups = RouterConfig(4, 2, num_groups=2, top_groups=1)
    assert route(groups)[0] == [1, 0]  # the best expert is in the first group
    by_sum = dataclasses.replace(groups, group_score="top2_sum")
    logits = torch.log(torch.tensor([[0.4, 0.05, 0.28, 0.27]]))
    assert route(groups, logits)[0] == [0, 1]
    assert route(by_sum, logits)[0] == [2, 3]  # .28 + .27 beats .4 + .05
