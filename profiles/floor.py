"""The schedule floor: the least time a token can take with these parts on this machine.

It is the formula of profiles/costs.py without overheads, with parts that were timed one by one:

    floor = head + sum over layers [ block + max( missed bytes / read rate, all other arithmetic ) + one missed expert ]

The last term only where something was missed: a layer cannot end before its last expert has landed and been computed.
All other arithmetic is shared, resident and missed experts but that one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from profiles.bandwidth import median_seconds
from profiles.costs import Costs, layer_times
from runtime import backends
from runtime.backends.base import Backend
from runtime.bundle import Bundle
from runtime.config import ModelConfig
from runtime.kv_cache import KVCache
from runtime.layout import expert_bytes, layer_tensors
from runtime.records import TokenRecord
from runtime.storage import read_file

_CONTEXT = 32  # tokens in the KV cache while blocks are timed
_BLOBS = 32  # experts that are timed in turn


@dataclass(frozen=True)
class PartCosts:
    """Seconds for one token: the head, a layer's dense block, its shared experts, one routed expert."""

    head_s: float
    block_s: float
    shared_s: float
    expert_s: float


@dataclass(frozen=True)
class Disk:
    """What a miss costs: blob size, and the best raw read rate for such blobs."""

    blob_bytes: int
    bytes_per_s: float


def token_floor(costs: PartCosts, disk: Disk, record: TokenRecord) -> float:
    """Seconds of one token with the hits and misses of its record."""
    parts = Costs(
        token_s=costs.head_s,
        layer_s=costs.block_s,
        shared_s=costs.shared_s,
        expert_s=costs.expert_s,
        read_s=lambda misses: misses * disk.blob_bytes / disk.bytes_per_s,
    )
    hits, misses = (np.array(counts, dtype=np.float64) for counts in (record.hits, record.misses))
    return costs.head_s + float(layer_times(parts, hits + misses, misses).total_s.sum())


def median_floor(costs: PartCosts, disk: Disk, records: Sequence[TokenRecord]) -> float:
    """Median of the tokens' floors, seconds."""
    return statistics.median(token_floor(costs, disk, record) for record in records)


def active_bytes(config: ModelConfig) -> int:
    """Bytes of fp16 weights that one token's arithmetic reads when everything is resident."""
    shapes = [shape for layer in range(config.num_layers) for shape in layer_tensors(config, layer).values()]
    dense = sum(math.prod(shape) for shape in shapes)
    dense += config.vocab_size * config.hidden_size  # the head
    router = 4 * len(config.moe_layers) * config.router.num_experts * config.hidden_size  # fp32
    return 2 * dense + router + config.experts_per_token * expert_bytes(config)


class Parts:
    """The parts of a model, to be timed apart from the engine: a back-end, and experts in its slots."""

    def __init__(self, backend: Backend, config: ModelConfig, slots: Sequence[torch.Tensor]) -> None:
        """`slots` hold whatever they hold: 16-bit arithmetic takes as long for any finite values."""
        self._backend, self._config, self._slots = backend, config, slots[:_BLOBS]
        self._cache = KVCache(config, 2 * _CONTEXT, backend.dtype, backend.device)
        self._cache.length = _CONTEXT

    @classmethod
    def load(cls, bundle: Bundle, name: str, dtype: torch.dtype) -> Parts:
        """On a back-end of their own, by a name that backends.choose has given: loads dense weights and a few blobs."""
        with torch.inference_mode():
            backend = backends.create(name, bundle, dtype)
        values, size = bundle.manifest.expert.bytes // 2, bundle.manifest.expert.file_bytes
        blobs = [read_file(bundle.directory, blob, size) for blob in sorted(bundle.blobs().values())[:_BLOBS]]
        return cls(backend, bundle.config, [torch.frombuffer(blob, dtype=torch.float16)[:values] for blob in blobs])

    @torch.inference_mode()
    def measure(self, rounds: int = 9) -> PartCosts:
        """Median seconds per call, each layer and blob in turn so that the processor's caches do not help."""
        backend, cache = self._backend, self._cache
        moe = self._config.moe_layers if self._config.shared_intermediate_size else ()
        with backend.step(1):
            x = backend.embed(torch.tensor([1]))
            _, h = backend.run_block(0, x, cache)
            return PartCosts(
                head_s=self._seconds([partial(backend.run_head, x)], rounds),
                block_s=self._seconds(
                    [partial(backend.run_block, n, x, cache) for n in range(self._config.num_layers)], rounds
                ),
                shared_s=self._seconds([partial(backend.run_mlp, n, h) for n in moe], rounds),
                expert_s=self._seconds([partial(backend.run_expert, h, slot) for slot in self._slots], rounds),
            )

    def _seconds(self, calls: Sequence[Callable[[], object]], rounds: int) -> float:
        """Per call; a back-end that returns before it has computed is waited for after the last."""

        def run() -> None:
            for call in calls:
                call()
            self._backend.synchronise()

        return median_seconds([run], rounds) / len(calls) if calls else 0.0
