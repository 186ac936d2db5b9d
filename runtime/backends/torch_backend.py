"""The torch back-end on the CPU; single tokens of a model that suits it go through the compiled block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from runtime.arena import Arena, Slots
from runtime.backends.base import one_by_one
from runtime.backends.block import CompiledBlock, suits
from runtime.backends.products import FEW_ROWS, Products
from runtime.backends.torch_parts import TorchDense, TorchExpert, load_weights
from runtime.bundle import Bundle
from runtime.kv_cache import KVCache
from runtime.layout import EMBED_FILE, embed_tensors


class TorchBackend:
    """Dense weights in memory in the compute dtype; expert blobs stay fp16 and are converted per use if they must."""

    name = "torch"

    def __init__(self, bundle: Bundle, dtype: torch.dtype) -> None:
        config = bundle.config
        self.device = torch.device("cpu")
        self.dtype = dtype
        self._embed_scale = config.embed_scale
        self._threads = torch.get_num_threads()
        self._products = Products(dtype, config.activation)
        kernel = self._products.kernel
        self.arithmetic = "compiled kernel" if kernel else "torch"
        self._embed = load_weights(bundle, EMBED_FILE, embed_tensors(config), dtype, self.device)["embed"]
        self._dense = TorchDense(bundle, self._products, dtype, self.device, self._embed)
        self._block = CompiledBlock(config, kernel, self._dense.layers) if kernel and suits(config) else None
        self._expert = TorchExpert(config, self._products)
        self._scratch = None if dtype == torch.float16 else torch.empty(self._expert.values, dtype=dtype)

    @contextmanager
    def step(self, count: int) -> Iterator[None]:
        """A few tokens with the compiled kernel leave torch only small operations. Those run on one thread: a parallel
        region waits for its slowest thread, up to a whole time slice where another process has the core.
        """
        torch.set_num_threads(1 if count <= FEW_ROWS and self._products.kernel else self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._embed[token_ids].float() * self._embed_scale

    def run_block(self, layer: int, x: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        if self._block is not None and len(x) == 1:
            return self._block.run(layer, x, cache)
        return self._dense.run_block(layer, x, cache)

    def run_mlp(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        return self._dense.run_mlp(layer, h)

    def run_expert(self, h: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        return self._expert.run(h, slot if self._scratch is None else self._scratch.copy_(slot))

    def run_experts(self, h: torch.Tensor, slots: Sequence[torch.Tensor]) -> torch.Tensor:
        together = self._products.experts(h, slots, self._expert.inner)
        return one_by_one(self.run_expert, h, slots) if together is None else together

    def run_head(self, x: torch.Tensor) -> torch.Tensor:
        return self._dense.run_head(x)

    def allocate_slots(self, slots: int, slot_bytes: int, value_bytes: int) -> Slots:
        return Arena(slots, slot_bytes, value_bytes)

    def synchronise(self) -> None:
        """Nothing to wait for: CPU calls return when they are done."""
