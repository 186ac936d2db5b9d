"""Streamed experts give the same bits as resident ones: at every cache size, policy and scope, direct or buffered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from export.exporter import export_bundle
from runtime.engine import Engine, EngineOptions
from runtime.policies import POLICIES
from tests.checkpoints import make_checkpoint

PROMPT = [(11 * i + 5) % 200 for i in range(30)]
EXPERTS, TOP_K = 7, 3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streamed")
    export_bundle(make_checkpoint(folder / "checkpoint", "qwen2_moe"), folder / "bundle")
    return folder / "bundle"


def all_logits(bundle: Path, **options: object) -> tuple[torch.Tensor, int]:
    """Logits of a prefill and of the same tokens one by one, and the experts read."""
    with Engine.open(bundle, EngineOptions(context=64, **options)) as engine:  # type: ignore[arg-type]
        prefill = engine.logits(PROMPT)
        engine.decoder.rewind()
        decode = torch.stack([engine.decoder.forward(torch.tensor([token])) for token in PROMPT])
        engine.check_integrity()
        return torch.cat([prefill, decode]), engine.decoder.cache.take_stats().bytes // engine.slot_bytes


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_size_and_policy_gives_the_same_bits(bundle: Path, dtype: str) -> None:
    resident, once = all_logits(bundle, dtype=dtype, slots_per_layer=EXPERTS)
    assert once <= 3 * EXPERTS  # each needed expert once, then all are resident
    for policy in POLICIES:
        for slots in range(TOP_K, EXPERTS):
            streamed, reads = all_logits(bundle, dtype=dtype, slots_per_layer=slots, policy=policy)
            assert torch.equal(streamed, resident), (policy, slots)
            assert reads > once or slots == EXPERTS - 1, "nothing was streamed"


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_shared_scope_and_buffered_reads_give_the_same_bits(bundle: Path, backend: str) -> None:
    resident, _ = all_logits(bundle, backend=backend, slots_per_layer=EXPERTS)
    for direct_io in (True, False):
        for scope in ("layer", "shared"):
            streamed, reads = all_logits(
                bundle, backend=backend, slots_per_layer=TOP_K, scope=scope, direct_io=direct_io
            )
            assert reads > 3 * EXPERTS
            assert torch.equal(streamed, resident), (scope, direct_io)


def test_prefill_reads_each_needed_expert_once_per_layer(bundle: Path) -> None:
    with Engine.open(bundle, EngineOptions(slots_per_layer=TOP_K, context=64)) as engine:
        engine.logits(PROMPT)
        stats = engine.decoder.cache.take_stats()
    assert stats.hits == [0, 0, 0]
    assert all(TOP_K <= misses <= EXPERTS for misses in stats.misses)


def test_long_prompts_go_through_in_pieces(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt longer than a dense block or than a prefill chunk gives the logits of one that fits."""
    options = EngineOptions(slots_per_layer=TOP_K, context=64, dtype="fp32")
    with Engine.open(bundle, options) as engine:
        whole = engine.logits(PROMPT)
        monkeypatch.setattr("runtime.decoder.BLOCK_TOKENS", 7)
        blocks = engine.logits(PROMPT)
        monkeypatch.setattr("runtime.decoder.CHUNK_BYTES", 1)
        chunks = engine.logits(PROMPT)
    assert torch.allclose(blocks, whole, atol=1e-4)
    assert torch.allclose(chunks, whole, atol=1e-4)
