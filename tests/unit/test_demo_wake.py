"""Idle experts of the demo's mixture come to life before distillation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from demo.distill.local import LocalOptions, feed_forward_inputs, fit_layers
from demo.distill.network import Network
from demo.distill.student import Student
from demo.distill.wake import LEAST, raise_idle, wake_experts
from demo.source import DenseSource
from tests.unit.demo_models import write_tiny_gguf

TOP_K = 2


def test_an_expert_that_nobody_chooses_gets_its_share() -> None:
    """Eight experts, one of them far below the others along the mean of the inputs."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(400, 16, generator=generator) + 2.0
    mean = h.mean(0)
    gate = torch.randn(8, 16, generator=generator)
    gate -= torch.outer(gate @ mean, mean / mean.dot(mean))  # all alike along the mean
    gate[3] -= 8 * mean / mean.dot(mean)
    mixture = SimpleNamespace(gate=gate)
    assert raise_idle(mixture, h, TOP_K) < 0.1
    chosen = F.linear(h, mixture.gate).topk(TOP_K, dim=-1).indices
    shares = torch.bincount(chosen.flatten(), minlength=8) * 8 / chosen.numel()
    assert shares.min() >= LEAST - 1e-6
    assert shares[3] < 1.5  # woken, not made the loudest


def test_every_layer_is_looked_at_and_busy_ones_are_left_alone(tmp_path: Path) -> None:
    network = Network.load(DenseSource(write_tiny_gguf(tmp_path / "tiny.gguf").path))
    rows = torch.randint(network.config.vocab_size, (4, 48), generator=torch.Generator().manual_seed(0))
    inputs = feed_forward_inputs(network, rows)
    options = LocalOptions(steps=1, batch=32, sample=64, shared=64, experts=8)
    student = Student(network, [mixture for mixture, _ in fit_layers(network, inputs, options)])
    before = [mixture.gate.clone() for mixture in student.mixtures]  # type: ignore[operator]
    least = wake_experts(student, rows, TOP_K)
    assert len(least) == len(network.layers)
    for share, old, mixture in zip(least, before, student.mixtures, strict=True):
        assert torch.equal(old, mixture.gate) == (share >= LEAST)  # type: ignore[arg-type]
