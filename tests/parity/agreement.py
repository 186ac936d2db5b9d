"""What parity with transformers means here, for any family: prefill logits, decode logits and greedy tokens in fp32.

Tolerance: 1e-3 of the range of the logits. Observed is below 1e-6; what is left is the order of sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from export.exporter import export_bundle
from runtime.engine import Engine, EngineOptions, GenerateOptions
from tests.checkpoints import load_reference, make_checkpoint

PROMPT = [(7 * i + 3) % 200 for i in range(21)]
NEW_TOKENS = 64
TOLERANCE = 1e-3


def bundle_and_reference(folder: Path, family: str, **overrides: Any) -> tuple[Path, Any]:
    """A small random model of a family below `folder`: as a bundle, and as the transformers model."""
    checkpoint = make_checkpoint(folder / "checkpoint", family, **overrides)
    export_bundle(checkpoint, folder / "bundle")
    return folder / "bundle", load_reference(checkpoint)


def assert_agrees(bundle: Path, reference: Any, backend: Any) -> None:
    """The engine on `bundle` computes and generates what the transformers model `reference` does."""
    options = EngineOptions(backend=backend, dtype="fp32", expert_memory_bytes=1 << 30, context=128)
    with Engine.open(bundle, options) as engine:
        tokens = [t.id for t in engine.generate(PROMPT, GenerateOptions(NEW_TOKENS, ignore_eos=True))]
        whole = torch.tensor([PROMPT + tokens])
        with torch.inference_mode():
            expected = reference(whole).logits[0]
        scale = float(expected.max() - expected.min())
        prefill = engine.logits(whole[0].tolist())
        assert float((prefill - expected).abs().max()) < TOLERANCE * scale
        engine.decoder.rewind()
        for position, token in enumerate(whole[0]):
            decode = engine.decoder.forward(token[None])
            assert float((decode - expected[position]).abs().max()) < TOLERANCE * scale, position
        assert tokens == expected[len(PROMPT) - 1 : -1].argmax(-1).tolist()
        engine.check_integrity()
