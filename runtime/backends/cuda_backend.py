"""torch on a GPU: the same formulas as the torch back-end, dense weights in the GPU's memory, experts in mapped slots.

`GpuBackend` is what every back-end on a GPU shares: embedding, experts from their slots, the stream.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch

from runtime.arena import Slots
from runtime.backends.attention import Attention, rms_norm
from runtime.backends.products import FEW_ROWS, Products
from runtime.bundle import Bundle
from runtime.cuda.arena import CudaArena
from runtime.cuda.device import Device, open_device
from runtime.cuda.expert_kernel import ExpertKernel
from runtime.dense import load_tensors
from runtime.errors import UsageError
from runtime.kv_cache import KVCache
from runtime.layout import EMBED_FILE, HEAD_FILE, embed_tensors, head_tensors, layer_file, layer_tensors


class GpuBackend:
    """Embedding and experts in torch on a GPU, everything in the order of one stream."""

    arithmetic: str

    def __init__(self, bundle: Bundle, dtype: torch.dtype, gpu: Device) -> None:
        config = self._config = bundle.config
        self._gpu = gpu
        self.device, self.dtype = gpu.torch, dtype
        self._products = Products(dtype, config.activation, compiled=False)
        with gpu.stream.current():
            self._embed = self._load(bundle, EMBED_FILE, embed_tensors(config))["embed"]
        inner, hidden = config.expert_intermediate_size, config.hidden_size
        self._split = 2 * inner * hidden
        self._gate_up_shape, self._down_shape = (2 * inner, hidden), (hidden, inner)
        self._scratch = torch.empty(3 * inner * hidden, dtype=dtype, device=self.device)
        self._kernel: ExpertKernel | None = None
        self._mixed = torch.empty(inner, device=self.device)

    def step(self, count: int) -> AbstractContextManager[None]:
        """Everything inside is given to the stream that computes."""
        return self._gpu.stream.current()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._embed[token_ids.to(self.device)].float() * self._config.embed_scale

    def fuse_experts(self, kernel: ExpertKernel | None = None) -> None:
        """Compute experts of single tokens with the kernels of runtime/cuda/expert.cu.

        Raises UsageError where they cannot be had, or the compute dtype is not theirs.
        """
        if self.dtype != torch.float16:
            raise UsageError("the fused expert kernel computes in fp16: --dtype fp16, or --expert-kernel torch")
        self._kernel = kernel or ExpertKernel(self._config, self._gpu.cuda.gpu)
        self.arithmetic += ", fused experts"

    def run_expert(self, h: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """A slot of mapped memory is not cached by the GPU: right for weights that are read once, for a few tokens. For
        more it is copied first, as it is for a compute dtype other than the blob's.
        """
        if self._kernel is not None and len(h) == 1:
            y = torch.empty(h.shape, device=self.device)
            places = h.data_ptr(), slot.data_ptr(), self._mixed.data_ptr(), y.data_ptr()
            self._kernel.run(*places, stream=self._gpu.stream.handle)
            return y
        if self.dtype != torch.float16 or (self._gpu.cuda.gpu.integrated and len(h) > FEW_ROWS):
            slot = self._scratch.copy_(slot)
        gate_up, down = slot[: self._split], slot[self._split :]
        return self._products.gated(h, gate_up.view(self._gate_up_shape), down.view(self._down_shape))

    def allocate_slots(self, slots: int, slot_bytes: int, value_bytes: int) -> Slots:
        """Slots that the disk fills and the GPU reads. Raises BudgetError."""
        return CudaArena(self._gpu.cuda, self._gpu.stream.handle, slots, slot_bytes, value_bytes)

    def synchronise(self) -> None:
        self._gpu.cuda.synchronise(self._gpu.stream.handle)

    def _load(self, bundle: Bundle, name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """Weights in the compute dtype; those of norms in fp32, in which norms are computed."""
        return {
            tensor: values.to(self.device, torch.float32 if tensor.endswith("norm") else self.dtype)
            for tensor, values in load_tensors(bundle, name, shapes).items()
        }


class CudaBackend(GpuBackend):
    """The dense parts in torch, too."""

    name = "cuda"

    def __init__(self, bundle: Bundle, dtype: torch.dtype, gpu: Device | None = None) -> None:
        """Raises UsageError where torch cannot compute on a GPU, BudgetError where the weights do not fit."""
        gpu = gpu or open_device()
        self.arithmetic = f"torch on {gpu.cuda.gpu.name}"
        try:
            super().__init__(bundle, dtype, gpu)
            self._load_dense(bundle)
        except torch.OutOfMemoryError as error:
            raise UsageError(f"the dense weights do not fit on {gpu.cuda.gpu.name}: {first_line(error)}") from None

    @staticmethod
    def weight_bytes(bundle: Bundle, dtype: torch.dtype) -> int:
        """Memory for the dense weights in `dtype`, bytes."""
        config = bundle.config
        tables = [embed_tensors(config), head_tensors(config)]
        tables += [layer_tensors(config, layer) for layer in range(config.num_layers)]
        return dtype.itemsize * sum(math.prod(shape) for table in tables for shape in table.values())

    def run_block(self, layer: int, x: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
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

    def run_head(self, x: torch.Tensor) -> torch.Tensor:
        normed = rms_norm(x, self._norm, self._config.norm_eps).to(self.dtype)
        return self._products.linear_fp32(normed, self._head) * self._config.logits_scale

    def _load_dense(self, bundle: Bundle) -> None:
        config = self._config
        with self._gpu.stream.current():
            head = self._load(bundle, HEAD_FILE, head_tensors(config))
            self._norm, self._head = head["norm"], head.get("head", self._embed)
            self._layers = [
                self._load(bundle, layer_file(layer), layer_tensors(config, layer))
                for layer in range(config.num_layers)
            ]
        self._attention = Attention(config, self._products, self.device)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().split("\n")[0][:300]
