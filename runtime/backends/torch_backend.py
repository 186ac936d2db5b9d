"""The torch back-end on the CPU: the definition that the other back-ends are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from runtime.arena import Arena, Slots
from runtime.backends.attention import Attention, rms_norm
from runtime.backends.block import CompiledBlock, suits
from runtime.backends.products import FEW_ROWS, Products
from runtime.bundle import Bundle
from runtime.config import ModelConfig
from runtime.dense import load_tensors
from runtime.kv_cache import KVCache
from runtime.layout import EMBED_FILE, HEAD_FILE, embed_tensors, head_tensors, layer_file, layer_tensors


class TorchBackend:
    """Dense weights in memory in the compute dtype; expert blobs stay fp16 and are converted per use if they must."""

    name = "torch"

    def __init__(self, bundle: Bundle, dtype: torch.dtype) -> None:
        config = bundle.config
        self.device = torch.device("cpu")
        self.dtype = dtype
        self._config: ModelConfig = config
        self._threads = torch.get_num_threads()
        self._products = Products(dtype, config.activation)
        self.arithmetic = "compiled kernel" if self._products.kernel else "torch"
        self._embed = self._load(bundle, EMBED_FILE, embed_tensors(config))["embed"]
        head = self._load(bundle, HEAD_FILE, head_tensors(config))
        self._norm, self._head = head["norm"], head.get("head", self._embed)
        self._layers = [self._load(bundle, layer_file(n), layer_tensors(config, n)) for n in range(config.num_layers)]
        self._attention = Attention(config, self._products)
        kernel = self._products.kernel if suits(config) else None
        self._block = None if kernel is None else CompiledBlock(config, kernel, self._layers)
        inner, hidden = config.expert_intermediate_size, config.hidden_size
        self._split = 2 * inner * hidden
        self._gate_up_shape, self._down_shape = (2 * inner, hidden), (hidden, inner)
        same = dtype == torch.float16
        self._scratch = None if same else torch.empty(3 * inner * hidden, dtype=dtype)

    @staticmethod
    def weight_bytes(bundle: Bundle, dtype: torch.dtype) -> int:
        """Memory for the dense weights in `dtype`, bytes."""
        files = bundle.manifest.files
        stored = sum(e.bytes for name, e in files.items() if name.startswith("dense/") and name.endswith("tensors"))
        return stored * dtype.itemsize // 2

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
        return self._embed[token_ids].float() * self._config.embed_scale

    def run_block(self, layer: int, x: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        if self._block is not None and len(x) == 1:
            return self._block.run(layer, x, cache)
        weights, config = self._layers[layer], self._config
        normed = rms_norm(x, weights["attn_norm"], config.norm_eps).to(self.dtype)
        attended = self._attention(weights, layer, normed, cache)
        x = torch.add(x, attended, alpha=config.residual_scale)
        return x, rms_norm(x, weights["ffn_norm"], config.norm_eps).to(self.dtype)

    def run_mlp(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        weights = self._layers[layer]
        out = self._products.gated(h, weights["mlp.gate_up"], weights["mlp.down"])
        if "mlp.router" in weights:
            out = out * self._products.linear_fp32(h, weights["mlp.router"]).sigmoid()
        return out

    def run_expert(self, h: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        if self._scratch is not None:
            slot = self._scratch.copy_(slot)
        gate_up, down = slot[: self._split], slot[self._split :]
        return self._products.gated(h, gate_up.view(self._gate_up_shape), down.view(self._down_shape))

    def run_head(self, x: torch.Tensor) -> torch.Tensor:
        normed = rms_norm(x, self._norm, self._config.norm_eps).to(self.dtype)
        return self._products.linear_fp32(normed, self._head) * self._config.logits_scale

    def allocate_slots(self, slots: int, slot_bytes: int, value_bytes: int) -> Slots:
        return Arena(slots, slot_bytes, value_bytes)

    def synchronise(self) -> None:
        """Nothing to wait for: CPU calls return when they are done."""

    def _load(self, bundle: Bundle, name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Weights in the compute dtype; those of norms in fp32, in which norms are computed."""
        return {
            tensor: values.to(torch.float32 if tensor.endswith("norm") else self.dtype)
            for tensor, values in load_tensors(bundle, name, shapes).items()
        }
