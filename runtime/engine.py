"""The engine: a bundle opened with options, and text or token ids in, tokens out.

engine = Engine.open("model.bundle", EngineOptions(slots_per_layer=16))
for token in engine.generate("Once upon a time", GenerateOptions(max_new_tokens=64)):
    print(token.text, end="")
print(engine.summary().tpot_ms)

What is behind it: opening.py (checks, and what is loaded in which order), generation.py (the loop over tokens),
decoder.py (one forward step), records.py (what is written down about each token).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from runtime.backends.base import Backend
from runtime.budget import Slots
from runtime.bundle import Bundle
from runtime.cache_prior import CachePrior, CachePriorRouter
from runtime.decoder import Decoder
from runtime.errors import UsageError
from runtime.generation import Generation, Token, Tokens
from runtime.layout import BASE_ROUTER
from runtime.machine import describe
from runtime.opening import Assembly, Resolved, resolve
from runtime.options import EngineOptions, GenerateOptions
from runtime.records import Recorder, Summary
from runtime.replay import ReplayRouter, Steps
from runtime.router import Router
from runtime.router_file import gates_sha256
from runtime.sampler import Sampler
from runtime.text import Tokenizer


class Engine:
    """An opened bundle: weights, expert cache and KV cache of one sequence. Use as a context manager or `close` it."""

    def __init__(
        self, bundle: Bundle, options: EngineOptions, resolved: Resolved, assembly: Assembly, notes: list[str]
    ) -> None:
        """Use Engine.open."""
        self.bundle, self.config, self.options, self.notes = bundle, bundle.config, options, notes
        self.router = assembly.router
        self._resolved, self._assembly = resolved, assembly
        self._recorder = Recorder(options.record)
        self._warm = False
        self._run: Generation | None = None
        self._held = contextlib.ExitStack()  # what `open` holds for it

    @classmethod
    def open(cls, path: str | Path, options: EngineOptions | None = None) -> Engine:
        """Open a bundle. Raises BundleError, BudgetError (with the sum) or UsageError; nothing is left open then."""
        options = options or EngineOptions()
        notes: list[str] = []
        with contextlib.ExitStack() as held:
            bundle = Bundle.open(path)
            held.callback(bundle.close)
            resolved = resolve(bundle, options, notes)
            assembly = Assembly(bundle, options, resolved, notes)
            held.callback(assembly.close)
            engine = cls(bundle, options, resolved, assembly, notes)
            engine._held = held.pop_all()
        return engine

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the record, end the reader threads and close the bundle's files. Safe to call twice."""
        try:
            self._recorder.close()
        finally:
            self._held.close()

    @property
    def context(self) -> int:
        """Most tokens of a sequence, prompt and answer together."""
        return self._resolved.context

    @property
    def slots(self) -> Slots:
        """Slots of the expert cache, over all layers and per layer."""
        return self._resolved.slots

    @property
    def slot_bytes(self) -> int:
        """Size of one slot: what reading one expert takes."""
        return self.bundle.manifest.expert.file_bytes

    @property
    def expert_budget_bytes(self) -> int:
        """Size of the arena."""
        return self._assembly.arena.size_bytes

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's tokenizer, if it has one."""
        return self._assembly.tokenizer

    @property
    def decoder(self) -> Decoder:
        """One forward step at a time; to be driven apart from the engine, never while a token is in work."""
        return self._assembly.decoder

    @property
    def backend(self) -> Backend:
        """Who computes; to be timed apart from the engine, never while a token is in work."""
        return self._assembly.backend

    @property
    def slot_tensors(self) -> list[torch.Tensor]:
        """The arena's slots as fp16 values, whatever is in them."""
        return self._assembly.arena.tensors

    @property
    def gates_sha256(self) -> str:
        """Fingerprint of the model's stock gates, whichever router is in use."""
        base = Path(BASE_ROUTER).stem
        stock = self.router if self.options.router == base else Router.load(self.bundle, base, self.backend.device)
        return gates_sha256(stock.tensors())

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt. Raises UsageError when it is empty, foreign to the vocabulary, or text without a
        tokenizer.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UsageError(f"{self.bundle.path} has no tokenizer: give token ids with --prompt-ids 1,2,3")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = list(prompt)
        if not ids:
            raise UsageError("the prompt is empty: give at least one token")
        wrong = [i for i in ids if not 0 <= i < self.config.vocab_size]
        if wrong:
            raise UsageError(f"token id {wrong[0]} is not in the vocabulary of {self.config.vocab_size}")
        return ids

    def generate(self, prompt: str | Sequence[int], options: GenerateOptions | None = None) -> Tokens:
        """Tokens one by one as they are computed; closing the iterator early ends the run cleanly.

        Raises UsageError before the first token, ReadError when an expert cannot be read (the next call works).
        """
        options = options or GenerateOptions()
        options.check()
        sampler = Sampler(options.sampling())
        begin = time.monotonic_ns()
        ids = self.encode(prompt)
        self._check_length(len(ids), options.max_new_tokens)
        return self._generate(Generation(self._assembly, ids, options, sampler, self.config.eos_token_ids), begin)

    def summary(self) -> Summary:
        """Figures of the last run, finished or not. Raises UsageError before the first."""
        if self._run is None:
            raise UsageError("nothing has been generated yet")
        summary, router = self._run.summary, self.decoder.router
        summary.work_out(self._run.records)
        summary.retries = self._assembly.loader.retries
        summary.route_agreement = router.agreement if isinstance(router, CachePriorRouter) else None
        return summary

    def report(self) -> dict[str, Any]:
        """The summary and the settings behind it, as one JSON object."""
        return {
            **asdict(self.summary()),
            "expert_budget_bytes": self.expert_budget_bytes,
            **self.settings(),
        }

    def settings(self) -> dict[str, Any]:
        """How the engine was opened, as resolved, and what routes now."""
        resolved, options = self._resolved, self.options
        replays = isinstance(self.decoder.router, ReplayRouter)
        return {
            "model": self.bundle.manifest.source.name,
            "source_fingerprint": self.bundle.manifest.source.fingerprint,
            "backend": resolved.backend,
            "arithmetic": self.backend.arithmetic,
            "dtype": resolved.dtype,
            "router": options.router,
            "routing": "replay" if replays else str(options.prior or "stock"),
            "policy": options.policy,
            "scope": options.scope,
            "prefetch": 0 if replays else resolved.slots.beside,
            "slots_per_layer": resolved.slots.per_layer,
            "slots": resolved.slots.total,
            "direct_io": self._assembly.storage.direct,
            "reader": self._assembly.loader.reader,
            "read_threads": options.read_threads,
            "threads": self._assembly.threads,
            "context": resolved.context,
            "memory_plan_bytes": {**asdict(resolved.plan), "total_bytes": resolved.plan.total_bytes},
        }

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [S, V] fp32 after every token of a fresh sequence (teacher forcing), on the CPU."""
        self.decoder.rewind()
        ids = self.encode(token_ids)
        with self.backend.step(len(ids)):
            return self.decoder.forward_all(torch.tensor(ids)).cpu()

    def use_router(self, name: str, prior: CachePrior | None = None) -> None:
        """Route with another router of this model from here on; with a prior, towards what is in the cache.

        Raises UsageError when there is none of that name, BundleError when it is not of this model.
        """
        self.router = Router.load(self.bundle, name, self.backend.device)
        self.decoder.router = self._assembly.routing(self.router, prior)
        self.decoder.rewind()
        facts = asdict(prior or CachePrior())
        changes = {f"prior_{field}": value for field, value in facts.items()}
        self.options = replace(self.options, router=name, routing="cache-prior" if prior else "stock", **changes)

    def use_policy(self, policy: str) -> None:
        """Empty the expert cache and let experts make room by another policy. Raises UsageError for an unknown one."""
        self._assembly.cache.use_policy(policy)
        self.options, self._warm = replace(self.options, policy=policy), False

    def replay(self, steps: Steps) -> None:
        """Route as recorded, from the first token of the next sequence on; `use_router` ends it.

        Nothing is read on a guess meanwhile: a recording gives nothing to guess from. Raises UsageError for steps of a
        model of another shape, where guesses were asked for, and in a sequence that goes on after the steps.
        """
        if self.options.prefetch:
            raise UsageError(f"--prefetch {self.options.prefetch}: a replayed routing cannot be guessed: leave it out")
        router = ReplayRouter(self.router, self.config, steps, self.backend.device)
        self.use_router(self.options.router)
        self.decoder.router = router

    def record_to(self, path: Path | None) -> None:
        """Close the record file, if there is one, and write the runs that follow into another, or None.

        Raises UsageError when it cannot be written; then nothing is recorded.
        """
        self._recorder.close()
        self._recorder = Recorder(path)
        self.options = replace(self.options, record=path)

    def empty_cache(self) -> None:
        """Forget every resident expert: the next run is a cold one."""
        self._assembly.cache.clear()
        self._warm = False

    def check_integrity(self) -> None:
        """Check the expert cache's books; for tests."""
        self._assembly.cache.check_integrity()

    def _generate(self, run: Generation, begin: int) -> Tokens:
        self._run, recorder = run, self._recorder
        recorder.header(self._header(run))
        self._warm = True
        try:
            yield from run.tokens(recorder, begin)
        finally:
            recorder.end(self.report())

    def _check_length(self, prompt: int, new: int) -> None:
        if prompt + new > self.context:
            raise UsageError(
                f"a prompt of {prompt} tokens and {new} new ones need a context of {prompt + new}, but it is "
                f"{self.context}: shorten them, or use --context (this model allows {self.config.max_context})"
            )

    def _header(self, run: Generation) -> dict[str, Any]:
        return {
            **self.settings(),
            "bundle": str(self.bundle.path),
            "cache": "warm" if self._warm else "cold",
            "prompt_tokens": len(run.prompt),
            "generate": asdict(run.options),
            "start_ns": time.monotonic_ns(),
            "machine": describe(),
        }


__all__ = ["Engine", "EngineOptions", "GenerateOptions", "Token"]
