"""torch on a GPU: the formulas of torch_parts.py, dense weights in the GPU's memory, experts in mapped slots.

`GpuBackend` is what every back-end on a GPU shares: embedding, experts from their slots, the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from runtime.arena import Slots
from runtime.backends.base import one_by_one
from runtime.backends.products import FEW_ROWS, Products
from runtime.backends.torch_parts import TorchDense, TorchExpert, load_weights
from runtime.bundle import Bundle
from runtime.cuda.arena import CudaArena
from runtime.cuda.device import Device, open_device
from runtime.cuda.expert_kernel import ExpertKernel
from runtime.errors import BudgetError, UsageError, first_line
from runtime.kv_cache import KVCache
from runtime.layout import EMBED_FILE, embed_tensors


class GpuBackend:
    """Embedding and experts in torch on a GPU, everything in the order of one stream."""

    arithmetic: str

    def __init__(self, bundle: Bundle, dtype: torch.dtype, gpu: Device) -> None:
        config = self._config = bundle.config
        self._gpu = gpu
        self.device, self.dtype = gpu.torch, dtype
        self._products = Products(dtype, config.activation, cpu=False)
        with gpu.stream.current():
            self._embed = load_weights(bundle, EMBED_FILE, embed_tensors(config), dtype, self.device)["embed"]
        self._expert = TorchExpert(config, self._products)
        self._scratch = torch.empty(self._expert.values, dtype=dtype, device=self.device)
        self._kernel: ExpertKernel | None = None
        self._mixed = torch.empty(config.expert_intermediate_size, device=self.device)

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
        return self._expert.run(h, slot)

    def run_experts(self, h: torch.Tensor, slots: Sequence[torch.Tensor]) -> torch.Tensor:
        """h [1, H] and several blobs' values to [len(slots), H] fp32."""
        return one_by_one(self.run_expert, h, slots)

    def allocate_slots(self, slots: int, slot_bytes: int, value_bytes: int) -> Slots:
        """Slots that the disk fills and the GPU reads. Raises BudgetError."""
        return CudaArena(self._gpu.cuda, self._gpu.stream.handle, slots, slot_bytes, value_bytes)

    def synchronise(self) -> None:
        self._gpu.cuda.synchronise(self._gpu.stream.handle)


class CudaBackend(GpuBackend):
    """The dense parts in torch, too."""

    name = "cuda"

    def __init__(self, bundle: Bundle, dtype: torch.dtype, gpu: Device | None = None) -> None:
        """Raises UsageError where torch cannot compute on a GPU, BudgetError where the weights do not fit."""
        gpu = gpu or open_device()
        self.arithmetic = f"torch on {gpu.cuda.gpu.name}"
        try:
            super().__init__(bundle, dtype, gpu)
            with gpu.stream.current():
                self._dense = TorchDense(bundle, self._products, dtype, self.device, self._embed)
        except torch.OutOfMemoryError as error:
            raise BudgetError(f"the dense weights do not fit on {gpu.cuda.gpu.name}: {first_line(error)}") from None

    def run_block(self, layer: int, x: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        return self._dense.run_block(layer, x, cache)

    def run_mlp(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        return self._dense.run_mlp(layer, h)

    def run_head(self, x: torch.Tensor) -> torch.Tensor:
        return self._dense.run_head(x)
