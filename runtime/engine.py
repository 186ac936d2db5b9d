"""The engine: a bundle opened with options, and text or token ids in, tokens out.

engine = Engine.open("model.bundle", EngineOptions(slots_per_layer=16))
for token in engine.generate("Once upon a time", GenerateOptions(max_new_tokens=64)):
    print(token.text, end="")
print(engine.summary().tpot_ms)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from runtime import backends
from runtime.backends.base import Backend
from runtime.bounce import reachable
from runtime.budget import plan_run
from runtime.bundle import Bundle
from runtime.cache import ExpertCache
from runtime.cache_prior import CachePrior, CachePriorRouter
from runtime.decoder import Decoder, Timing
from runtime.errors import UsageError
from runtime.kv_cache import KVCache
from runtime.layout import BASE_ROUTER
from runtime.loader import Loader
from runtime.machine import describe
from runtime.options import DEFAULT_CONTEXT, DTYPES, EngineOptions, GenerateOptions
from runtime.records import FinishReason, Meter, Recorder, Summary, TokenRecord
from runtime.replay import ReplayRouter, Steps
from runtime.router import Router, Routing
from runtime.router_file import gates_sha256
from runtime.sampler import Sampler
from runtime.storage import ExpertStorage, Storage
from runtime.stream import StreamDecoder
from runtime.text import Tokenizer


@dataclass(frozen=True)
class Token:
    """One output token: `text` is what may be printed now (stop strings are held back), empty without a tokenizer."""

    id: int
    text: str
    record: TokenRecord


Tokens = Generator[Token, None, None]


@dataclass
class _Run:
    """State of one generation."""

    summary: Summary
    stream: StreamDecoder | None
    records: list[TokenRecord] = field(default_factory=list)


class Engine:
    """An opened bundle: weights, expert cache and KV cache of one sequence. Use as a context manager or `close` it."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        """Use Engine.open."""
        options.check()
        config = bundle.config
        self.bundle, self.config, self.options = bundle, config, options
        self.notes: list[str] = []
        if options.prior is not None:
            options.prior.check(config.router.top_k)
            self.notes.append(f"{options.prior}: what comes out depends on what is in the cache")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._threads = torch.get_num_threads()
        self.context = _context(bundle, options, self.notes)
        self.backend_name, reason = backends.choose(options.backend, bundle, self.context)
        if options.backend == "auto":
            self.notes.append(f"back-end {reason}")
        self.dtype_name = "fp16" if options.dtype == "auto" else options.dtype
        self.slots, self.plan = plan_run(
            bundle, options, self.backend_name, DTYPES[self.dtype_name], self.context, self.notes
        )
        self.tokenizer = Tokenizer.from_files(
            {name.split("/")[1]: bundle.read(name) for name in bundle.manifest.files if name.startswith("tokenizer/")}
        )
        self._stack = contextlib.ExitStack()
        self._build()
        self._warm = False
        self._run: _Run | None = None

    @classmethod
    def open(cls, path: str | Path, options: EngineOptions | None = None) -> Engine:
        """Open a bundle. Raises BundleError, BudgetError (with the sum) or UsageError."""
        bundle = Bundle.open(path)
        try:
            return cls(bundle, options or EngineOptions())
        except BaseException:
            bundle.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the record, the reader threads and the bundle's files. Safe to call twice."""
        self._stack.close()

    @property
    def slot_bytes(self) -> int:
        """Size of one slot: what reading one expert takes."""
        return self.bundle.manifest.expert.file_bytes

    @property
    def expert_budget_bytes(self) -> int:
        """Size of the arena."""
        return self._arena.size_bytes

    @property
    def backend(self) -> Backend:
        """Who computes; to be timed apart from the engine, never while a token is in work."""
        return self._backend

    @property
    def slot_tensors(self) -> list[torch.Tensor]:
        """The arena's slots as fp16 values, whatever is in them."""
        return self._arena.tensors

    @property
    def gates_sha256(self) -> str:
        """Fingerprint of the model's stock gates, whichever router is in use."""
        base = Path(BASE_ROUTER).stem
        stock = self.router if self.options.router == base else Router.load(self.bundle, base, self._backend.device)
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
        sampler = Sampler(options.sampling())
        begin = time.monotonic_ns()
        ids = self.encode(prompt)
        self._check_length(len(ids), options.max_new_tokens)
        return self._generate(ids, options, sampler, begin)

    def summary(self) -> Summary:
        """Figures of the last run, finished or not. Raises UsageError before the first."""
        if self._run is None:
            raise UsageError("nothing has been generated yet")
        self._run.summary.add(self._run.records)
        self._run.summary.retries = self._loader.retries
        router = self.decoder.router
        self._run.summary.route_agreement = router.agreement if isinstance(router, CachePriorRouter) else None
        return self._run.summary

    def report(self) -> dict[str, Any]:
        """The summary and the settings behind it, as one JSON object."""
        return {
            **asdict(self.summary()),
            "expert_budget_bytes": self.expert_budget_bytes,
            **self.settings(),
        }

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [S, V] fp32 after every token of a fresh sequence (teacher forcing), on the CPU."""
        self.decoder.rewind()
        ids = self.encode(token_ids)
        with self._backend.step(len(ids)):
            return self.decoder.forward_all(torch.tensor(ids)).cpu()

    def use_router(self, name: str, prior: CachePrior | None = None) -> None:
        """Route with another router of this model from here on; with a prior, towards what is in the cache.

        Raises UsageError when there is none of that name, BundleError when it is not of this model.
        """
        self.router = Router.load(self.bundle, name, self._backend.device)
        self.decoder.router = self._routing(self.router, prior)
        self.decoder.rewind()
        facts = asdict(prior or CachePrior())
        changes = {f"prior_{field}": value for field, value in facts.items()}
        self.options = replace(self.options, router=name, routing="cache-prior" if prior else "stock", **changes)

    def replay(self, steps: Steps) -> None:
        """Route as recorded, from the first token of the next sequence on; `use_router` ends it.

        Raises UsageError for steps of a model of another shape; a sequence that goes on after them raises it, too.
        """
        router = ReplayRouter(self.router, self.config, steps, self._backend.device)
        self.use_router(self.options.router)
        self.decoder.router = router

    def _routing(self, router: Router, prior: CachePrior | None) -> Routing:
        return CachePriorRouter(router, self._cache, prior) if prior is not None else router

    def record_to(self, path: Path | None) -> None:
        """Close the record file, if there is one, and write the runs that follow into another, or None.

        Raises UsageError when it cannot be written; then nothing is recorded.
        """
        self._recorder.close()
        self._open_record(None)
        self._open_record(path)
        self.options = replace(self.options, record=path)

    def empty_cache(self) -> None:
        """Forget every resident expert: the next run is a cold one."""
        self._cache.clear()
        self._warm = False

    def check_integrity(self) -> None:
        """Check the expert cache's books; for tests."""
        self._cache.check_integrity()

    def _build(self) -> None:
        """Load the dense weights first: what is transient then is gone when the arena is allocated."""
        bundle, options, dtype = self.bundle, self.options, DTYPES[self.dtype_name]
        layout = bundle.manifest.expert
        self._storage: ExpertStorage = bundle.open_experts(options.direct_io)
        self._stack.callback(self._storage.close)
        self.notes += self._storage.notes
        if not options.direct_io:
            self.notes.append("reads: buffered, as asked for with --no-direct-io")
        with torch.inference_mode():
            backend = self._backend = backends.create(
                self.backend_name, bundle, dtype, self.context, options.cuda_graphs, options.expert_kernel
            )
            self.router = Router.load(bundle, options.router, backend.device)
        if backend.name == "torch" and self.dtype_name == "fp16" and backend.arithmetic == "torch":
            self.notes.append(
                "arithmetic: torch alone, slower than the compiled kernel: install a C compiler, then the package again"
            )
        self._arena = backend.allocate_slots(self.slots.total, layout.file_bytes, layout.bytes)
        self._loader = Loader(self._reader(), bundle.blob_checksums(), layout.file_bytes, options.read_threads)
        self._stack.callback(self._close_loader)
        self._cache = ExpertCache(self.config.moe_layers, self._arena, self._loader, options.policy, options.scope)
        kv_cache = KVCache(self.config, self.context, dtype, backend.device)
        self.decoder = Decoder(self.config, backend, self._routing(self.router, options.prior), self._cache, kv_cache)
        self._open_record(options.record)

    def _open_record(self, path: Path | None) -> None:
        self._recorder: Recorder = Recorder(path)
        self._stack.callback(self._recorder.close)

    def _reader(self) -> Storage:
        """The blobs' storage, through a buffer where the disk cannot fill the slots itself."""
        if self._backend.device.type == "cpu":
            return self._storage
        storage, note = reachable(self._storage, (self.config.moe_layers[0], 0), self._arena.views[0])
        self.notes += [note] if note else []
        return storage

    def _close_loader(self) -> None:
        """The threads end, and then the memory that they read into goes; a read that hangs keeps it."""
        self._loader.close()
        if not self._loader.dead:
            self._arena.close()

    def _generate(self, ids: list[int], options: GenerateOptions, sampler: Sampler, begin: int) -> Tokens:
        stream = self.tokenizer.stream(options.stop) if self.tokenizer else None
        run = self._run = _Run(Summary(prompt_tokens=len(ids)), stream)
        self._recorder.header(self._header(len(ids), options))
        self._warm = True
        try:
            run.summary.finish_reason = "error"
            yield from self._tokens(run, ids, options, sampler, begin)
        except (GeneratorExit, KeyboardInterrupt):
            run.summary.finish_reason = "interrupted"
            raise
        finally:
            run.summary.text += run.stream.finish() if run.stream else ""  # what a stop string might have swallowed
            self._recorder.end(self.report())

    def _tokens(self, run: _Run, ids: list[int], options: GenerateOptions, sampler: Sampler, begin: int) -> Tokens:
        """The loop: forward, sample, record, yield. Sets the finish reason."""
        meter, stream = Meter(self._loader.busy_ns()), run.stream
        run.summary.reused_tokens = self.decoder.shared_prefix(ids) if options.reuse_prefix else 0
        self.decoder.rewind(run.summary.reused_tokens)
        self._cache.take_stats()
        history, inputs = list(ids), torch.tensor(ids[run.summary.reused_tokens :])
        reason: FinishReason | None = None
        for index in range(options.max_new_tokens):
            with self._backend.step(len(inputs)):
                chosen = sampler.choose(self.decoder.forward(inputs), history)
            history.append(chosen)
            run.summary.token_ids.append(chosen)
            text = stream.push(chosen) if stream else ""
            reason = self._finished(index, chosen, options, bool(stream and stream.stopped))
            if reason and stream:
                text += "" if stream.stopped else stream.finish()
            timing, self.decoder.timing = self.decoder.timing, Timing()
            ready = time.monotonic_ns()
            record = meter.record(
                index, chosen, ready - begin, timing, self._cache.take_stats(), self._loader.busy_ns()
            )
            run.records.append(record)
            run.summary.text += text
            try:
                yield Token(chosen, text, record)
            finally:  # also when the caller has had enough
                begin = time.monotonic_ns()
                self._recorder.token(record)
            if reason:
                run.summary.finish_reason = reason
                return
            inputs = torch.tensor([chosen])

    def _finished(self, index: int, token_id: int, options: GenerateOptions, stopped: bool) -> FinishReason | None:
        if stopped:
            return "stop"
        if token_id in self.config.eos_token_ids and not options.ignore_eos:
            return "eos"
        return "length" if index + 1 == options.max_new_tokens else None

    def _check_length(self, prompt: int, new: int) -> None:
        if new < 1:
            raise UsageError(f"--max-new-tokens {new}: expected at least 1")
        if prompt + new > self.context:
            raise UsageError(
                f"a prompt of {prompt} tokens and {new} new ones need a context of {prompt + new}, but it is "
                f"{self.context}: shorten them, or use --context (this model allows {self.config.max_context})"
            )

    def settings(self) -> dict[str, Any]:
        """How the engine was opened, as resolved, and what routes now."""
        return {
            "model": self.bundle.manifest.source.name,
            "source_fingerprint": self.bundle.manifest.source.fingerprint,
            "backend": self.backend_name,
            "arithmetic": self._backend.arithmetic,
            "dtype": self.dtype_name,
            "router": self.options.router,
            "routing": "replay"
            if isinstance(self.decoder.router, ReplayRouter)
            else str(self.options.prior or "stock"),
            "policy": self.options.policy,
            "scope": self.options.scope,
            "slots_per_layer": self.slots.per_layer,
            "slots": self.slots.total,
            "direct_io": self._storage.direct,
            "read_threads": self.options.read_threads,
            "threads": self._threads,
            "context": self.context,
            "memory_plan_bytes": {**asdict(self.plan), "total_bytes": self.plan.total_bytes},
        }

    def _header(self, prompt_tokens: int, options: GenerateOptions) -> dict[str, Any]:
        return {
            **self.settings(),
            "bundle": str(self.bundle.path),
            "cache": "warm" if self._warm else "cold",
            "prompt_tokens": prompt_tokens,
            "generate": asdict(options),
            "start_ns": time.monotonic_ns(),
            "machine": describe(),
        }


def _context(bundle: Bundle, options: EngineOptions, notes: list[str]) -> int:
    most = bundle.config.max_context
    if options.context is None:
        if most > DEFAULT_CONTEXT:
            notes.append(f"context: {DEFAULT_CONTEXT} of the model's {most} tokens (--context changes it)")
        return min(most, DEFAULT_CONTEXT)
    if options.context > most:
        raise UsageError(f"--context {options.context}: this model allows {most} tokens")
    return options.context


__all__ = ["Engine", "EngineOptions", "GenerateOptions", "Token"]
