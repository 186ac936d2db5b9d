"""Products of many fp16 rows, by torch's own kernels and in fp32, whichever this processor would take."""

from __future__ import annotations

import pytest
import torch

from runtime.backends import products
from runtime.backends.products import FEW_ROWS, Products

ROWS = FEW_ROWS + 3


@pytest.fixture(params=[False, True], ids=["torch", "fp32"])
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Products:
    monkeypatch.setattr(products, "_multiplies_half", lambda: not request.param)
    monkeypatch.setattr(products, "_WIDE_VALUES", 5 * 24)  # pieces of five rows, the last one shorter
    return Products(torch.float16, "silu")


def half(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).half()


def test_a_product_and_its_bias(many: Products) -> None:
    h, weight, bias = half(ROWS, 24), half(33, 24), half(33)
    exact = h.double() @ weight.double().T
    assert torch.allclose(many.linear(h, weight, bias).double(), exact + bias.double(), rtol=2e-3, atol=2e-2)
    assert torch.allclose(many.linear_fp32(h, weight).double(), exact, rtol=2e-3, atol=1e-2)
    assert many.linear(h, weight).dtype == torch.float16
    assert many.linear_fp32(h, weight).is_contiguous()


def test_inner_values_beyond_fp16(many: Products) -> None:
    """Inner values here reach several times the largest number of fp16."""
    h, gate_up, down = half(ROWS, 24, scale=9), half(2 * 24, 24, scale=9), half(24, 24)
    gate, up = (h.double() @ gate_up.double().T).chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate) * up
    exact = inner @ down.double().T
    assert inner.abs().max() > 2 * torch.finfo(torch.float16).max
    found = many.gated(h, gate_up, down)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 5e-3 * exact.abs().max()


def test_the_choice_is_for_fp16_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_multiplies_half", lambda: False)
    monkeypatch.setattr(products, "_wide", lambda *_: pytest.fail("converted to fp32"))
    for dtype, cpu in ((torch.bfloat16, True), (torch.float32, True), (torch.float16, False)):
        h, weight = half(ROWS, 24).to(dtype), half(33, 24).to(dtype)
        assert Products(dtype, "silu", cpu).linear(h, weight).dtype == dtype
