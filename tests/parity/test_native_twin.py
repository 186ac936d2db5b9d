"""The committed twin, a trained model, through the engine: as in transformers, and streamed as resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from demo.evaluate import load_model
from demo.native import CHECKPOINT, held_out_chapters
from export.exporter import export_bundle
from runtime.engine import Engine, EngineOptions
from tests.parity.agreement import assert_agrees


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("twin") / "bundle"
    export_bundle(CHECKPOINT, path)
    return path


@pytest.fixture(scope="module")
def reference() -> Any:
    """In transformers, with the weights as fp16 holds them: bf16 reaches further down."""
    model = load_model(str(CHECKPOINT), Path("unused"))
    for name, parameter in model.named_parameters():
        if not name.endswith("mlp.gate.weight"):  # routers stay in fp32
            parameter.data = parameter.data.half().float()
    return model


def test_agrees_with_transformers(bundle: Path, reference: Any) -> None:
    assert_agrees(bundle, reference, "torch")


def test_streamed_as_resident_on_held_out_text(bundle: Path) -> None:
    """A quarter of the experts have slots; the same bits, and the text is still predicted as the model card says."""
    ids = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(held_out_chapters()[0]).ids[:200]
    logits = {}
    for slots in (8, 32):
        with Engine.open(bundle, EngineOptions(dtype="fp32", slots_per_layer=slots)) as engine:
            logits[slots] = torch.stack([engine.decoder.forward(torch.tensor([token])) for token in ids])
            engine.check_integrity()
            read = engine.decoder.cache.take_stats().bytes // engine.slot_bytes
            assert read > 6 * 32 if slots == 8 else read <= 6 * 32
    assert torch.equal(logits[8], logits[32])
    nats = torch.nn.functional.cross_entropy(logits[8][:-1], torch.tensor(ids[1:]))
    assert nats.exp() < 60  # 25 over the test part; this is one chapter, and its beginning
