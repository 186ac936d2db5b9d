"""Storages for tests: blobs in memory, and faults as a class of their own instead of patched functions."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable

import numpy as np
import xxhash

from runtime.arena import Arena
from runtime.cache import ExpertCache, Scope
from runtime.config import RouterConfig
from runtime.layout import expert_identity
from runtime.loader import Loader

Key = tuple[int, int]


class MemoryStorage:
    """Blobs that differ in every byte position and between experts."""

    direct = False

    def __init__(self, layers: int, experts: int, blob_bytes: int) -> None:
        self.blobs: dict[Key, np.ndarray] = {}
        for layer in range(layers):
            for expert in range(experts):
                random = np.random.default_rng([layer, expert])
                self.blobs[layer, expert] = random.integers(0, 256, blob_bytes, dtype=np.uint8)
        self.reads = 0

    def read(self, layer: int, expert: int, offset: int, view: memoryview) -> int:
        self.reads += 1
        data = self.blobs[layer, expert][offset : offset + len(view)]
        view[: len(data)] = data.data
        return len(data)

    def name(self, layer: int, expert: int) -> str:
        return f"experts/layer_{layer:02d}/expert_{expert:03d}.fp16"

    def checksums(self) -> dict[Key, int]:
        return {
            key: xxhash.xxh3_64_intdigest(blob.tobytes(), seed=expert_identity(*key))
            for key, blob in self.blobs.items()
        }


class FaultyStorage(MemoryStorage):
    """Fails by rule: `fault(count, layer, expert)` gives what read number `count` (from 1) does instead of reading.

    "eio" raises, "flip" changes one bit, "short" reads half, "one" reads one byte, "end" says the file is over, None
    reads well. `fired` counts the faults.
    """

    def __init__(
        self, layers: int, experts: int, blob_bytes: int, fault: Callable[[int, int, int], str | None]
    ) -> None:
        super().__init__(layers, experts, blob_bytes)
        self.fault = fault
        self.fired = 0
        self._lock = threading.Lock()

    def read(self, layer: int, expert: int, offset: int, view: memoryview) -> int:
        with self._lock:
            kind = self.fault(self.reads + 1, layer, expert)
            self.fired += kind is not None
        if kind == "eio":
            self.reads += 1
            raise OSError(errno.EIO, "Input/output error")
        if kind == "end":
            self.reads += 1
            return 0
        if kind in ("short", "one"):
            view = view[: 1 if kind == "one" else max(1, len(view) // 2)]
        if kind == "hang":
            time.sleep(3)
        count = super().read(layer, expert, offset, view)
        if kind == "flip":
            view[count // 2] ^= 1
        return count


def make_cache(
    storage: MemoryStorage,
    layers: int,
    slots: int,
    policy: str = "lru",
    scope: Scope = "layer",
    threads: int = 2,
    deadline_s: float = 30.0,
    compiled: bool = False,
    prefetch: int = 0,
) -> tuple[ExpertCache, Loader]:
    """A cache of `slots` slots over layers 0 ... layers - 1, and `prefetch` beside it."""
    blob_bytes = len(storage.blobs[0, 0])
    loader = Loader(storage, storage.checksums(), blob_bytes, threads, deadline_s, compiled)
    arena = Arena(slots + prefetch, blob_bytes, blob_bytes)
    rules = RouterConfig(num_experts=1 + max(expert for _, expert in storage.blobs), top_k=1)
    return ExpertCache(range(layers), rules, arena, loader, policy, scope, prefetch), loader


def residents(cache: ExpertCache, layer: int) -> set[int]:
    """Experts of a layer that are in the cache now."""
    return set(cache.held(layer).nonzero()[0].tolist())
