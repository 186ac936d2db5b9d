"""Opening a bundle: what its options leave open is worked out and checked, then everything that runs it is loaded.

The dense weights come first: what is transient while they are loaded is gone when the expert slots are allocated.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from runtime import backends
from runtime.backends.base import Backend
from runtime.bounce import reachable
from runtime.budget import Slots, plan_run
from runtime.bundle import Bundle
from runtime.cache import ExpertCache
from runtime.cache_prior import CachePrior, CachePriorRouter
from runtime.decoder import Decoder
from runtime.errors import UsageError
from runtime.kv_cache import KVCache
from runtime.loader import Loader
from runtime.machine import core_counts
from runtime.memory import MemoryPlan
from runtime.options import DEFAULT_CONTEXT, DTYPES, EngineOptions
from runtime.router import Router, Routing
from runtime.storage import ExpertStorage, Storage
from runtime.text import Tokenizer


@dataclass(frozen=True)
class Resolved:
    """What the options stand for with this bundle on this machine. `context` is in tokens, `dtype` a key of DTYPES."""

    context: int
    backend: str
    dtype: str
    slots: Slots
    plan: MemoryPlan


def resolve(bundle: Bundle, options: EngineOptions, notes: list[str]) -> Resolved:
    """Check the options and decide what they leave open; each choice is told in `notes`.

    Raises UsageError, or BudgetError with the sum.
    """
    options.check()
    if options.prefetch is not None and options.prefetch > bundle.config.router.top_k:
        raise UsageError(
            f"--prefetch {options.prefetch}: expected 0 to {bundle.config.router.top_k}, the experts of a token"
        )
    if options.prior is not None:
        options.prior.check(bundle.config.router.top_k)
        notes.append(f"{options.prior}: what comes out depends on what is in the cache")
    context = _context(bundle, options, notes)
    backend, reason = backends.choose(options.backend, bundle, context)
    if options.backend == "auto":
        notes.append(f"back-end {reason}")
    dtype = "fp16" if options.dtype == "auto" else options.dtype
    slots, plan = plan_run(bundle, options, backend, DTYPES[dtype], context, notes)
    return Resolved(context, backend, dtype, slots, plan)


class Assembly:
    """Everything that runs one bundle: put together in the order of the lines below, given back in the reverse one."""

    def __init__(self, bundle: Bundle, options: EngineOptions, resolved: Resolved, notes: list[str]) -> None:
        """`notes` gets what a person should know. Raises BundleError, UsageError, BudgetError or ReadError; nothing is
        held then.
        """
        config, layout = bundle.config, bundle.manifest.expert
        self.threads = _set_threads(options.threads, notes)
        self.tokenizer = _tokenizer(bundle)
        with contextlib.ExitStack() as held:
            self.storage = _open_storage(bundle, options, notes)
            held.callback(self.storage.close)
            with torch.inference_mode():
                self.backend = _load_backend(bundle, options, resolved, notes)
                self.router = Router.load(bundle, options.router, self.backend.device)
            self.arena = self.backend.allocate_slots(
                resolved.slots.total + resolved.slots.beside, layout.file_bytes, layout.bytes
            )
            with contextlib.ExitStack() as unread:  # until there is a loader, nothing else gives the memory back
                unread.callback(self.arena.close)
                storage = self._reachable_storage(bundle, notes)
                self.loader = Loader(storage, bundle.blob_checksums(), layout.file_bytes, options.read_threads)
                unread.pop_all()
            held.callback(self._close_loader)
            self.cache = ExpertCache(
                config.moe_layers,
                config.router,
                self.arena,
                self.loader,
                options.policy,
                options.scope,
                resolved.slots.beside,
            )
            kv_cache = KVCache(config, resolved.context, DTYPES[resolved.dtype], self.backend.device)
            routing = self.routing(self.router, options.prior)
            self.decoder = Decoder(config, self.backend, routing, self.cache, kv_cache)
            self._held = held.pop_all()

    def routing(self, router: Router, prior: CachePrior | None) -> Routing:
        """What the decoder asks: `router` as it is, or leaning towards what is in the cache."""
        return CachePriorRouter(router, self.cache, prior) if prior is not None else router

    def close(self) -> None:
        """End the reader threads, give the slots back and close the blobs. Safe to call twice."""
        self._held.close()

    def _reachable_storage(self, bundle: Bundle, notes: list[str]) -> Storage:
        """The blobs' storage, through a buffer where the disk cannot fill the slots itself."""
        if self.backend.device.type == "cpu":
            return self.storage
        storage, note = reachable(self.storage, (bundle.config.moe_layers[0], 0), self.arena.views[0])
        notes += [note] if note else []
        return storage

    def _close_loader(self) -> None:
        """The threads end, and then the memory that they read into goes; a read that hangs keeps it."""
        self.loader.close()
        if not self.loader.dead:
            self.arena.close()


def _context(bundle: Bundle, options: EngineOptions, notes: list[str]) -> int:
    most = bundle.config.max_context
    if options.context is None:
        if most > DEFAULT_CONTEXT:
            notes.append(f"context: {DEFAULT_CONTEXT} of the model's {most} tokens (--context changes it)")
        return min(most, DEFAULT_CONTEXT)
    if options.context > most:
        raise UsageError(f"--context {options.context}: this model allows {most} tokens")
    return options.context


def _tokenizer(bundle: Bundle) -> Tokenizer | None:
    names = [name for name in bundle.manifest.files if name.startswith("tokenizer/")]
    return Tokenizer.from_files({name.split("/")[1]: bundle.read(name) for name in names})


def _set_threads(wanted: int | None, notes: list[str]) -> int:
    """How many compute: torch's choice knows the cores that a process is bound to, and no quota of a container. More
    threads than that wait for each other while the kernel holds one of them back.
    """
    own, usable = torch.get_num_threads(), core_counts()[0]
    threads = wanted or min(own, usable)
    if threads != own:
        torch.set_num_threads(threads)
        if wanted is None:
            notes.append(f"arithmetic: {threads} of {own} threads: no more cores may be kept busy (quota, taskset)")
    return threads


def _open_storage(bundle: Bundle, options: EngineOptions, notes: list[str]) -> ExpertStorage:
    storage = bundle.open_experts(options.direct_io)
    notes += storage.notes
    if not options.direct_io:
        notes.append("reads: buffered, as asked for with --no-direct-io")
    return storage


def _load_backend(bundle: Bundle, options: EngineOptions, resolved: Resolved, notes: list[str]) -> Backend:
    backend = backends.create(
        resolved.backend,
        bundle,
        DTYPES[resolved.dtype],
        resolved.context,
        options.cuda_graphs,
        options.expert_kernel,
    )
    if backend.name == "torch" and resolved.dtype == "fp16" and backend.arithmetic == "torch":
        notes.append(
            "arithmetic: torch alone, slower than the compiled kernel: install a C compiler, then the package again"
        )
    return backend
