"""The checks, one per engine and precision. Each returns figures; what cannot be run raises NotRunError."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from interop import reference
from interop.compare import FP32, NARROW, Agreement, Limits, agree, complaints
from interop.environments import LLAMA, LM_EVAL, VLLM, Installer, run_module
from interop.lm_eval_engine import questions, write_task
from interop.observed import Observed, Request
from interop.prepare import NEW_TOKENS, Prepared, Subject
from runtime.config import ModelConfig
from runtime.layout import router_tensors
from runtime.router_file import load_router

_QUESTIONS = 40
Result = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What the checks share: the prepared checkpoints, the references, and where things are kept."""

    prepared: Prepared
    installer: Installer
    folder: Path

    @cached_property
    def twin(self) -> tuple[Observed, Observed]:
        """The reference on the twin, with the stock router and with the tuned one."""
        return self._reference(self.prepared.twin)

    @cached_property
    def plain(self) -> tuple[Observed, Observed]:
        """The reference on the variant for llama.cpp."""
        return self._reference(self.prepared.plain)

    def request(self, model: Path, dtype: str = "float32") -> Request:
        """The same texts and prompts for everybody."""
        return Request(str(model), dtype, self.prepared.texts, self.prepared.prompts, NEW_TOKENS)

    def observe(self, python: Path, name: str, request: Request) -> Observed:
        """Run an engine's module in its environment."""
        asked, answer = self.folder / f"{name}.request.json", self.folder / f"{name}.npz"
        request.save(asked)
        module = f"interop.{name.split('-')[0]}_engine"
        run_module(python, module, [str(asked), str(answer)], self.folder / f"{name}.log")
        return Observed.load(answer)

    def _reference(self, subject: Subject) -> tuple[Observed, Observed]:
        stock, tuned = (
            reference.observe(self.request(path), subject.config) for path in (subject.stock, subject.tuned)
        )
        return stock, tuned


def transformers(bench: Bench) -> Result:
    """The exported checkpoint in transformers against our engine with the stock bundle and the router file."""
    ours = reference.observe_bundle(bench.request(bench.prepared.bundle), bench.prepared.router)
    return {"versions": bench.twin[1].facts, **_judge(bench.twin, ours, FP32)}


def vllm(bench: Bench, dtype: str = "float32") -> Result:
    """The exported checkpoint in vLLM against transformers."""
    python = bench.installer.python(VLLM)
    found = bench.observe(python, f"vllm-{dtype}", bench.request(bench.prepared.twin.tuned, dtype))
    return {"versions": found.facts, **_judge(bench.twin, found, FP32 if dtype == "float32" else NARROW)}


def llama(bench: Bench, dtype: str = "f32") -> Result:
    """The exported checkpoint, through llama.cpp's converter, in llama.cpp against transformers."""
    python = bench.installer.python(LLAMA)
    file = bench.folder / f"plain-tuned-{dtype}.gguf"
    words = ["gpt-2", str(bench.prepared.plain.tuned), "--outfile", str(file), "--outtype", dtype]
    run_module(python, "interop.gguf_convert", words, bench.folder / f"convert-{dtype}.log")
    found = bench.observe(python, f"llama-{dtype}", bench.request(file, dtype))
    gates = gates_in_gguf(file, bench.prepared.router, bench.prepared.plain.config)
    result = _judge(bench.plain, found, FP32 if dtype == "f32" else NARROW)
    if gates:
        result["complaints"] = [*result["complaints"], f"gates of layers {gates} are not those of the router file"]
    return {"versions": found.facts, "gates_bit_equal": not gates, **result}


def lm_eval(bench: Bench) -> Result:
    """A task of lm-evaluation-harness: our adapter and the harness's own for transformers must agree."""
    from demo.native import held_out_chapters

    python = bench.installer.python(LM_EVAL)
    tasks, asked, answer = (bench.folder / name for name in ("tasks", "lm-eval.json", "lm-eval.result.json"))
    rows = questions(held_out_chapters(), _QUESTIONS)
    write_task(tasks, rows)
    twin = bench.prepared.twin
    job = {"tasks": tasks, "bundle": bench.prepared.bundle, "router": bench.prepared.router,
           "stock": twin.stock, "tuned": twin.tuned}  # fmt: skip
    asked.write_text(json.dumps({name: str(path) for name, path in job.items()}), encoding="utf-8")
    run_module(
        python, "interop.lm_eval_engine", [str(asked), str(answer)], bench.folder / "lm-eval.log",
        HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(bench.folder / "datasets"),
    )  # fmt: skip
    found = json.loads(answer.read_text(encoding="utf-8"))
    return {
        "versions": {"lm_eval": found.pop("lm_eval")},
        "questions": len(rows),
        **found,
        "complaints": same_scores(found),
    }


def same_scores(found: dict[str, float]) -> list[str]:
    """Our adapter's accuracy and log-likelihoods against those of the harness's own, for each router."""
    said = []
    for name in ("stock", "tuned"):
        ours, theirs, gap = (found[f"{what}_{name}"] for what in ("engine", "transformers", "largest_gap"))
        if ours != theirs:
            said.append(f"{name} router: {ours} right on our engine, {theirs} on transformers")
        if not gap <= FP32.score:
            said.append(f"{name} router: log-likelihoods {gap:.2g} apart, allowed {FP32.score}")
    return said


def gates_in_gguf(file: Path, router: Path, config: ModelConfig) -> list[int]:
    """Layers whose gate in a GGUF file is not, bit for bit, that of the router file."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    tuned, _ = load_router(router, router_tensors(config))
    wrong = []
    for name, weight in tuned.items():
        layer = int(name.removeprefix("layer_").split(".")[0])
        stored = tensors[f"blk.{layer}.ffn_gate_inp.weight"]
        if stored.tensor_type.name != "F32" or not np.array_equal(np.asarray(stored.data), weight.numpy()):
            wrong.append(layer)
    return wrong


def _judge(pair: tuple[Observed, Observed], found: Observed, limits: Limits) -> Result:
    stock, tuned = pair
    agreement: Agreement = agree(tuned, stock, found, limits)
    return {**agreement.figures(), "complaints": complaints(agreement, limits)}


CHECKS: dict[str, Callable[[Bench], Result]] = {
    "transformers": transformers,
    "vllm": vllm,
    "vllm bf16": lambda bench: vllm(bench, "bfloat16"),
    "llama.cpp": llama,
    "llama.cpp bf16": lambda bench: llama(bench, "bf16"),
    "lm-eval": lm_eval,
}
