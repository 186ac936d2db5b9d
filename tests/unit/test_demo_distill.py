"""The recipe of the trained demo model, run on a tiny slice: split, first stage, distillation, pack, rebuild."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from demo.build import write_checkpoint
from demo.distill import distil as stages
from demo.distill.curve import draw, legs, points
from demo.distill.distil import DistilOptions, distil
from demo.distill.local import LocalOptions, feed_forward_inputs, fit_layers
from demo.distill.mixture import Mixture
from demo.distill.network import Network
from demo.distill.pack import Packed, pack
from demo.distill.selfwrite import write_chats
from demo.distill.split import HOMES, Split, find_homes, split_neurons
from demo.distill.student import Student, dense_pass, divergence
from demo.reference import dense_model
from demo.source import DenseSource
from demo.tokenizer import build_tokenizer
from runtime.errors import CheckpointError
from tests.unit.demo_models import HIDDEN, INNER, LAYERS, write_tiny_gguf

EXPERTS, SHARED, ROWS, LENGTH = 8, 64, 6, 24


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DenseSource:
    return DenseSource(write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf").path)


@pytest.fixture(scope="module")
def network(source: DenseSource) -> Network:
    return Network.load(source)


@pytest.fixture(scope="module")
def rows(network: Network) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(network.config.vocab_size, (ROWS, LENGTH), generator=generator)


@pytest.fixture
def student(network: Network, rows: torch.Tensor) -> Student:
    options = LocalOptions(steps=4, batch=32, sample=64, shared=SHARED, experts=EXPERTS)
    return Student(network, [m for m, _ in fit_layers(network, feed_forward_inputs(network, rows), options)])


def test_network_is_the_model_that_transformers_runs(source: DenseSource, network: Network, rows: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = dense_model(source)(rows).logits
        found = network.logits(dense_pass(network, rows, keep=())[-1])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_split_finds_neurons_that_speak_together() -> None:
    """Neurons 0 and 1 are always loud; of the others, every third token has its own pair."""
    contributions = torch.full((66, 8), 0.01)
    contributions[:, :2] = 5.0
    for token in range(3):
        contributions[token::3, 2 + 2 * token : 4 + 2 * token] = 1.0
    split = split_neurons(contributions + 1e-4 * torch.rand(66, 8), shared=2, experts=3, seed=0)
    assert split.shared.tolist() == [0, 1]
    assert split.routed.tolist() == [2, 3, 4, 5, 6, 7]
    assert split.membership().tolist() == [[1.0] * 6] * 3  # as many homes as experts: everywhere


def test_homes_are_different_experts_of_equal_size() -> None:
    vectors = F.normalize(torch.randn(48, 16, generator=torch.Generator().manual_seed(1)), dim=1).numpy()
    homes = find_homes(vectors, 8, seed=0)
    assert all(len(set(row)) == HOMES for row in homes.tolist())
    for column in range(HOMES):
        assert np.bincount(homes[:, column], minlength=8).tolist() == [6] * 8


def test_a_neuron_counts_with_the_sum_of_its_experts(network: Network) -> None:
    """With all experts chosen and gate 0, every weight is c / E: with c = E / HOMES, the dense layer."""
    layer = network.layers[0]
    routed = torch.arange(SHARED, INNER)
    homes = torch.cat([routed.view(EXPERTS, -1).roll(home, 0) for home in range(HOMES)], dim=1)
    split = Split(torch.arange(SHARED), homes.sort().values)
    mixture = Mixture(layer, split, torch.zeros(EXPERTS, HIDDEN), float(np.log(EXPERTS / HOMES)), rank=2)
    h = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(mixture(h, top_k=EXPERTS).output, network.mlp(layer, h), atol=1e-4, rtol=1e-4)


def test_training_lowers_the_divergence_and_logs_it(
    student: Student, rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kl() -> float:
        with torch.no_grad():
            wanted = dense_pass(student.network, rows, ())[-1].flatten(0, 1)
            return divergence(student.network, student(rows, top_k=8).hidden[-1].flatten(0, 1), wanted).item()

    clock = iter(range(10_000))
    monkeypatch.setattr(stages.time, "monotonic", lambda: float(next(clock)))  # a second per look
    before, saves = kl(), []
    options = DistilOptions(minutes=1.5, positions=16, keep=(0,), warm_up=2)
    tokens = distil(student, rows, options, tmp_path / "log.jsonl", lambda: saves.append(1))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kl() < 0.9 * before
    assert tokens == lines[-1]["tokens"] == 2 * LENGTH * len(lines)
    assert lines[-1]["kl"] < lines[0]["kl"]
    assert saves


def test_packed_and_rebuilt_speaks_as_the_student(
    student: Student, source: DenseSource, rows: torch.Tensor, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        for mixture in student.mixtures:
            mixture.in_b += 0.02 * torch.randn_like(mixture.in_b)
    pack(list(student.mixtures)).save(tmp_path / "mixture.safetensors")
    packed = Packed.load(tmp_path / "mixture.safetensors")
    digests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        digests.append(write_checkpoint(source, tmp_path / name, packed))
    assert digests[0] == digests[1]
    rebuilt = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32).eval()
    assert rebuilt.config.num_experts_per_tok == 8
    assert rebuilt.config.norm_topk_prob is False
    with torch.inference_mode():
        expected = student.network.logits(student(rows, top_k=8).hidden[-1])
        torch.testing.assert_close(rebuilt(rows).logits, expected, atol=0.05, rtol=0.02)  # weights and gates are fp16
    assert len(rebuilt.model.layers) == LAYERS


def test_curve_of_two_legs(tmp_path: Path) -> None:
    """Ten steps of 100 tokens, then five: the second leg goes on where the first ended."""
    log = tmp_path / "log.jsonl"
    rows = [
        {"step": n, "tokens": 100 * n, "kl": kl} for kl, count in ((0.5, 10), (0.25, 5)) for n in range(1, count + 1)
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = legs(log)
    assert points(first, 0) == ([1.0], [0.5])
    assert points(second, 1000) == ([1.5], [0.25])
    draw(log, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 2000


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"gate": np.zeros(3, np.float32)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="tensors are"):
        Packed.load(tmp_path / "x")


def test_chats_take_turns(source: DenseSource, network: Network) -> None:
    tokenizer = build_tokenizer(source.tokenizer())
    chats = write_chats(network, tokenizer, rows=3, length=110, seed=0)
    assert chats.shape == (3, 110)
    again = write_chats(network, tokenizer, rows=3, length=110, seed=0)
    assert torch.equal(chats, again)
    marker = tokenizer.token_to_id("<|im_start|>")
    assert all((chat == marker).sum() >= 2 for chat in chats)  # the system's and the first question's at least
