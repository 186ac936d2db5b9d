"""The reference: transformers, in fp32, on the same checkpoint; the exact router of every layer is watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from interop.observed import Array, Observed, Request, next_scores, stack_rows
from remoe.gates import decision, find_gate
from runtime.config import ModelConfig


def observe(request: Request, config: ModelConfig) -> Observed:
    """Read the texts and answer the prompts with transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float32).eval()
    found = Observed([], [], [], [], facts={"transformers": transformers.__version__, "torch": torch.__version__})
    seen: list[list[Array]] = [[] for _ in config.moe_layers]
    for rows, layer in zip(seen, config.moe_layers, strict=True):
        gate = getattr(*find_gate(model, config, layer))
        gate.register_forward_hook(lambda m, i, out, rows=rows: rows.append(decision(out)[2].numpy()))
    with torch.inference_mode():
        for text in request.texts:
            for rows in seen:
                rows.clear()
            scores, best = next_scores(model(torch.tensor([text])).logits[0].numpy(), text)
            found.experts.append(stack_rows(seen, len(text)))
            found.scores.append(scores)
            found.best.append(best)
        for prompt in request.prompts:
            _answer(found, model, prompt, request.new_tokens)
    return found


def _answer(found: Observed, model: Any, prompt: list[int], new_tokens: int) -> None:
    said = model.generate(
        torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    two = [torch.log_softmax(step[0].double(), -1).topk(2).values for step in said.logits]
    found.answers.append(said.sequences[0, len(prompt) :].numpy())
    found.answer_margins.append(np.array([float(a - b) for a, b in two], np.float32))


def observe_bundle(request: Request, router: Path) -> Observed:
    """Our own engine, experts streamed, with the router file beside the stock bundle: no new export."""
    from remoe.record import record_text, watching
    from runtime.engine import Engine, EngineOptions, GenerateOptions

    options = EngineOptions(slots_per_layer=8, context=512, dtype="fp32", router=str(router))
    found = Observed([], [], [], [])
    with Engine.open(request.model, options) as engine:
        with watching(engine) as watcher:
            for number, text in enumerate(request.texts):
                block = record_text(engine, watcher, number, text, stepwise=False)
                assert block is not None and block.experts is not None
                found.experts.append(np.sort(block.experts, axis=-1))
        for prompt in request.prompts:
            tokens = engine.generate(prompt, GenerateOptions(request.new_tokens, ignore_eos=True))
            found.answers.append(np.array([token.id for token in tokens]))
    return found
