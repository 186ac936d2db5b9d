"""Matrix products of the torch back-end: torch's own, and for fp16 the compiled kernel's for a few rows, and products
in fp32 for many rows where the processor does not multiply fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional

from runtime import native

Activation = Callable[[torch.Tensor], torch.Tensor]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


FEW_ROWS = 8  # up to here a product is bound by reading the weights, and the kernel reads them faster
_WIDE_VALUES = 1 << 20  # weights that are converted to fp32 at a time: 4 MB, which stay in the processor's cache


class Products:
    """Products with weights [out, in] in one compute dtype."""

    def __init__(self, dtype: torch.dtype, activation: str, cpu: bool = True) -> None:
        """`cpu`: on the CPU, where fp16 has the compiled kernel, and products in fp32 where those are faster."""
        self._dtype = dtype
        self._activation = _ACTIVATIONS[activation]
        half = cpu and dtype == torch.float16
        #: What computes products of a few rows; None where it is torch.
        self.kernel = native.load(torch.get_num_threads()) if half else None
        self._gated_kernel = self.kernel if activation == "silu" else None
        self._widens = half and not _multiplies_half()

    def linear(self, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """h [S, in] to [S, out], both in the compute dtype."""
        y = self._linear_fp32(h, weight)
        if y is None:
            return functional.linear(h, weight, bias)
        return (y if bias is None else y.add_(bias)).half()

    def linear_fp32(self, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Like `linear`, but the result is fp32 and, with the kernel or in fp32, was never less."""
        y = self._linear_fp32(h, weight)
        return functional.linear(h, weight).float() if y is None else y

    def gated(self, h: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """act(gate) * up through down: h [S, H] to [S, H] fp32; gate_up [2I, H], down [H, I].

        Real models have tokens whose inner values or outputs leave the range of fp16 (65,504), so there each row is
        divided by its largest inner value before the last product, and multiplied by it after.
        """
        if self._gated_kernel is not None and len(h) <= FEW_ROWS:
            return self._gated_kernel.gated_mlp(h.float(), gate_up, down)
        if self._widens and len(h) > 1:
            gate, up = _wide(gate_up, h.float().T).chunk(2)
            return _wide(down, self._activation(gate) * up).T.contiguous()
        gate, up = functional.linear(h, gate_up).chunk(2, dim=-1)
        if self._dtype != torch.float16:
            return functional.linear(self._activation(gate) * up, down).float()
        inner = self._activation(gate.float()) * up
        scale = inner.abs().amax(dim=-1, keepdim=True).clamp_(min=1.0)
        return functional.linear((inner / scale).half(), down).float() * scale

    def experts(self, h: torch.Tensor, values: Sequence[torch.Tensor], inner: int) -> torch.Tensor | None:
        """Several experts on one token at once, h [1, H] to [len(values), H] fp32; None where no kernel does that."""
        return None if self._gated_kernel is None else self._gated_kernel.experts(h.float(), values, inner)

    def _linear_fp32(self, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """h [S, in] to [S, out] fp32 by what is faster than torch's own product; None where nothing is."""
        if self.kernel is not None and len(h) <= FEW_ROWS:
            return self.kernel.linear(h.float(), weight)
        return _wide(weight, h.float().T).T.contiguous() if self._widens and len(h) > 1 else None


def _multiplies_half() -> bool:
    """Whether torch's fp16 products use instructions for fp16; without them they are two to four times slower than a
    conversion of the weights and a product in fp32.
    """
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return known is not None and bool(known())


def _wide(weight: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Weights [out, in] fp16 times h [in, S] fp32 to [out, S] fp32, some weights at a time."""
    rows, cols = weight.shape
    step = min(rows, max(1, _WIDE_VALUES // cols))
    scratch, y = torch.empty(step, cols), torch.empty(rows, h.shape[1])
    for start in range(0, rows, step):
        part = weight[start : start + step]
        torch.mm(scratch[: len(part)].copy_(part), h, out=y[start : start + step])
    return y
