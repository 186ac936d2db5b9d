"""Matrix products of the torch back-end: torch's own, and for a few rows of fp16 the compiled kernel's."""

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


class Products:
    """Products with weights [out, in] in one compute dtype."""

    def __init__(self, dtype: torch.dtype, activation: str, compiled: bool = True) -> None:
        """`compiled`: take the compiled kernel where there is one, which computes on the CPU only."""
        self._dtype = dtype
        self._activation = _ACTIVATIONS[activation]
        wanted = compiled and dtype == torch.float16
        #: What computes products of a few rows; None where it is torch.
        self.kernel = native.load(torch.get_num_threads()) if wanted else None
        self._gated_kernel = self.kernel if activation == "silu" else None

    def linear(self, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """h [S, in] to [S, out], both in the compute dtype."""
        if self.kernel is None or len(h) > FEW_ROWS:
            return functional.linear(h, weight, bias)
        y = self.kernel.linear(h.float(), weight)
        return (y if bias is None else y.add_(bias)).half()

    def linear_fp32(self, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Like `linear`, but the result is fp32 and, with the kernel, was never less."""
        if self.kernel is None or len(h) > FEW_ROWS:
            return functional.linear(h, weight).float()
        return self.kernel.linear(h.float(), weight)

    def gated(self, h: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """act(gate) * up through down: h [S, H] to [S, H] fp32; gate_up [2I, H], down [H, I].

        Real models have tokens whose inner values or outputs leave the range of fp16 (65,504), so there each row is
        divided by its largest inner value before the last product, and multiplied by it after.
        """
        if self._gated_kernel is not None and len(h) <= FEW_ROWS:
            return self._gated_kernel.gated_mlp(h.float(), gate_up, down)
        gate, up = functional.linear(h, gate_up).chunk(2, dim=-1)
        if self._dtype != torch.float16:
            return functional.linear(self._activation(gate) * up, down).float()
        inner = self._activation(gate.float()) * up
        scale = inner.abs().amax(dim=-1, keepdim=True).clamp_(min=1.0)
        return functional.linear((inner / scale).half(), down).float() * scale

    def experts(self, h: torch.Tensor, values: Sequence[torch.Tensor], inner: int) -> torch.Tensor | None:
        """Several experts on one token at once, h [1, H] to [len(values), H] fp32; None where no kernel does that."""
        return None if self._gated_kernel is None else self._gated_kernel.experts(h.float(), values, inner)
