"""The compiled kernel against fp64, for every instruction set of this processor, and its threads."""

from __future__ import annotations

import ctypes
import os
import threading

import pytest
import torch

from runtime import native
from runtime.native import Kernel
from tests.kernels import LEVELS, start

SHAPES = [(1, 1), (3, 7), (4, 8), (33, 40), (50, 577), (257, 1408), (2048, 576)]


@pytest.mark.parametrize("level", LEVELS)
def test_products_equal_fp64(library: ctypes.CDLL, level: str) -> None:
    kernel = start(library, level)
    generator = torch.Generator().manual_seed(0)
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns, generator=generator).half()
        x = torch.randn(7, columns, generator=generator)
        exact = x.double() @ weight.double().T
        # fp32 sums of up to 1408 products of size one: 2^-24 per addition, with room.
        assert torch.allclose(kernel.linear(x, weight).double(), exact, atol=1e-6 * columns), (rows, columns)
        alone = torch.cat([kernel.linear(row[None], weight) for row in x])
        assert torch.equal(kernel.linear(x, weight), alone), "a row's bits depend on the others"


@pytest.mark.parametrize("level", LEVELS)
def test_special_halves_are_read_right(library: ctypes.CDLL, level: str) -> None:
    values = [0.0, -0.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-24), 2.0**-14, 1.0009765625, 1023 * 2.0**-24]
    weight = torch.tensor(values).half()[:, None]
    found = start(library, level).linear(torch.ones(1, 1), weight)[0]
    assert found.tolist() == values


def test_threads_give_the_same_bits(library: ctypes.CDLL) -> None:
    weight, x = torch.randn(999, 300).half(), torch.randn(1, 300)
    one = Kernel(library, 1).linear(x, weight)
    several = Kernel(library, 3)
    for _ in range(200):
        assert torch.equal(several.linear(x, weight), one)


def test_callers_take_turns(library: ctypes.CDLL) -> None:
    kernel = Kernel(library, 2)
    weights = [torch.randn(800, 200).half() for _ in range(3)]
    x = torch.randn(1, 200)
    expected = [kernel.linear(x, w) for w in weights]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(200):
            if not torch.equal(kernel.linear(x, weights[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gated_mlp_equals_fp64_beyond_the_range_of_fp16(library: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(1)
    gate_up = (20 * torch.randn(2 * 40, 64, generator=generator)).half()
    down = (20 * torch.randn(64, 40, generator=generator)).half()
    x = torch.randn(6, 64, generator=generator)
    gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=-1)
    exact = (torch.nn.functional.silu(gate) * up) @ down.double().T
    assert float(exact.abs().max()) > 65504
    assert torch.allclose(Kernel(library, 2).gated_mlp(x, gate_up, down).double(), exact, rtol=1e-4, atol=1.0)


def test_every_bf16_becomes_the_nearest_fp16(library: ctypes.CDLL) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    target = torch.empty(len(every), dtype=torch.float16)
    assert native.half_from_bf16(every, target) is False
    expected = every.float().half()
    assert torch.equal(target.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(target[number].view(torch.int16), expected[number].view(torch.int16))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100])
def test_finite_means_every_result(library: ctypes.CDLL, count: int) -> None:
    source, target = torch.ones(count, dtype=torch.bfloat16), torch.full((count + 1,), -1.0, dtype=torch.float16)
    assert native.half_from_bf16(source, target[:count]) is True
    assert target.tolist() == [1.0] * count + [-1.0]
    for bad in range(count):
        for value in (float("nan"), float("-inf"), 65536.0):
            source[bad] = value
            assert native.half_from_bf16(source, target[:count]) is False
        source[bad] = 1.0


def test_silu_is_right_from_end_to_end_of_its_range(library: ctypes.CDLL) -> None:
    """One neuron per value: gate and up are the value and 1, down passes it on."""
    values = torch.cat([torch.linspace(-120, 120, 961), torch.tensor([0.0, -0.0, 1e-6, -1e-6, 2e4, -2e4])]).half()
    gate_up = torch.cat([values, torch.ones_like(values)])[:, None].repeat(1, len(values))
    x = torch.zeros(1, len(values))
    x[0, 0] = 1.0
    found = Kernel(library, 1).gated_mlp(x, gate_up, torch.eye(len(values)).half())[0]
    exact = torch.nn.functional.silu(values.double())
    assert torch.allclose(found.double(), exact, rtol=1e-6, atol=1e-30)


def test_a_short_slice_keeps_policy_and_nice_value(library: ctypes.CDLL) -> None:
    found: list[tuple[bool, int, int]] = []

    def ask() -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, 7)
        answer = native.short_slice()
        found.append((answer, os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [(True, os.SCHED_OTHER, 7)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("inner", [5, 24, 300])  # pieces of 16 rows reach over the border of two experts
def test_experts_together_have_the_bits_of_each_alone(library: ctypes.CDLL, level: str, inner: int) -> None:
    kernel, hidden = start(library, level), 100
    values = [torch.randn(3 * inner * hidden).half() for _ in range(5)]
    x, split = torch.randn(1, hidden), 2 * inner * hidden
    alone = [kernel.gated_mlp(x, v[:split].view(-1, hidden), v[split:].view(hidden, inner)) for v in values]
    assert torch.equal(kernel.experts(x, values, inner), torch.cat(alone))
