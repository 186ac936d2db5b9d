"""vLLM on the CPU, in an environment of its own: `python -m interop.vllm_engine REQUEST.json OUT.npz`

Routing is taken from the hook that vLLM itself uses to return routed experts; the option for it needs a model runner
that needs Triton, which is not there on a CPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from interop.observed import Array, Observed, Request, stack_rows

_CONTEXT = 512


def observe(request: Request) -> Observed:
    """Read the texts and answer the prompts."""
    # One process, so that the hooks see the model; a small key-value cache; no report of usage to anybody.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    import torch
    import transformers
    import vllm

    llm = vllm.LLM(
        model=request.model, dtype=request.dtype, max_model_len=_CONTEXT, max_num_seqs=1, enforce_eager=True,
        enable_prefix_caching=False, seed=0, disable_log_stats=True, max_num_batched_tokens=_CONTEXT,
    )  # fmt: skip
    seen: list[list[Array]] = []
    llm.apply_model(lambda model: _watch(model, seen))
    if not seen:
        raise RuntimeError("no router of vLLM can be watched: does this model have experts?")
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    found = Observed([], [], [], [], facts=versions)
    once = vllm.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=1, detokenize=False)
    for text in request.texts:
        for rows in seen:
            rows.clear()
        (result,) = llm.generate([{"prompt_token_ids": text}], once, use_tqdm=False)
        found.experts.append(stack_rows(seen, len(text)))
        told = [row for row in result.prompt_logprobs if row is not None]
        found.scores.append(np.array([row[i].logprob for row, i in zip(told, text[1:], strict=True)], np.float32))
        found.best.append(np.array([next(i for i, p in row.items() if p.rank == 1) for row in told]))
    many = vllm.SamplingParams(temperature=0, max_tokens=request.new_tokens, ignore_eos=True, detokenize=False)
    for prompt in request.prompts:
        (result,) = llm.generate([{"prompt_token_ids": prompt}], many, use_tqdm=False)
        found.answers.append(np.array(result.outputs[0].token_ids))
    return found


def _watch(model: Any, seen: list[list[Array]]) -> None:
    """Let every router, in layer order, leave its choices in a list of its own."""
    for module in model.modules():
        router = getattr(module, "router", None)
        if router is not None and hasattr(router, "set_capture_fn"):
            rows: list[Array] = []
            router.set_capture_fn(lambda ids, rows=rows: rows.append(ids.cpu().numpy().copy()))
            seen.append(rows)


if __name__ == "__main__":
    observe(Request.load(Path(sys.argv[1]))).save(Path(sys.argv[2]))
