"""Decoding blocks as CUDA graphs: dozens of kernels of one block become one launch, which a slow CPU notices.

A graph is bound to shapes and addresses. So the past has a length from a few buckets (rows that are not there yet are
hidden by the mask), inputs and outputs lie in buffers that never move, and the two new rows are copied to their place
after each launch. Each graph has a context of its own, as TensorRT asks for, in the scratch memory that all share.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from runtime.backends.tensorrt_engine import DECODE, TORCH_DTYPES, Call, Part
from runtime.config import ModelConfig
from runtime.cuda.device import Device
from runtime.graph_io import block_part, part_io
from runtime.kv_cache import KVCache

LEAST_ROWS = 64
Rows = tuple[torch.Tensor, torch.Tensor]
Tensors = Mapping[str, torch.Tensor]


class Captured(NamedTuple):
    """A graph; the call keeps the context alive whose memory it uses."""

    graph: int
    call: Call


class DecodeGraphs:
    """The graphs of every layer and bucket, made when they are first needed."""

    def __init__(self, config: ModelConfig, gpu: Device, parts: Mapping[str, Part]) -> None:
        self._gpu, self._parts = gpu, parts
        self._captured: dict[tuple[int, int, int], Captured] = {}
        # At the end of the process the driver takes everything back by itself, and may be gone already.
        weakref.finalize(self, _destroy, gpu.cuda, self._captured).atexit = False
        sizes = {"S": 1, "T": 1}
        io = part_io(config, block_part(0))
        fixed = (*io.inputs[:3], *io.outputs)  # x, cos, sin; every layer uses the same buffers, one after the other
        self._buffers = {
            tensor.name: torch.zeros(tensor.shape(sizes), dtype=TORCH_DTYPES[tensor.dtype], device=gpu.torch)
            for tensor in fixed
        }
        self._outputs = {tensor.name: self._buffers[tensor.name] for tensor in io.outputs}
        self._masks: dict[int, torch.Tensor] = {}
        self._masked: tuple[int, int] = (-1, -1)

    def run_block(self, layer: int, x: torch.Tensor, turn: Rows, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """One token x [1, H] after cache.length rows (at least one); writes its rows into the cache."""
        past, rows = cache.length, bucket(cache.length, cache.capacity)
        for name, value in (("x", x), ("cos", turn[0]), ("sin", turn[1])):
            self._buffers[name].copy_(value)
        inputs = {
            **{name: self._buffers[name] for name in ("x", "cos", "sin")},
            "mask": self._mask(past, rows),
            "past_k": cache.keys[layer, :rows],
            "past_v": cache.values[layer, :rows],
        }
        self._launch(layer, rows, inputs)
        cache.keys[layer, past].copy_(self._buffers["k_new"][0])
        cache.values[layer, past].copy_(self._buffers["v_new"][0])
        # Copies: the next layer writes into the same buffers.
        return self._buffers["x_attn"].clone(), self._buffers["h"].clone()

    def _launch(self, layer: int, rows: int, inputs: Tensors) -> None:
        cuda, stream = self._gpu.cuda, self._gpu.stream.handle
        key = (layer, rows, inputs["past_k"].data_ptr())
        if key in self._captured:
            cuda.launch(self._captured[key].graph, stream)
            return
        call = self._parts[block_part(layer)].new_call(DECODE, stream)
        # The first time TensorRT settles on the shapes, which cannot be written down; it is this token's call as well.
        call.run(inputs, self._outputs, stream)
        cuda.begin_capture(stream)
        try:
            call.run(inputs, self._outputs, stream)
        finally:
            graph = cuda.end_capture(stream)
        self._captured[key] = Captured(graph, call)

    def _mask(self, past: int, rows: int) -> torch.Tensor:
        """[1, rows + 1] fp32 in a buffer per bucket: the past and the token itself are seen, the padding is not."""
        if rows not in self._masks:
            self._masks[rows] = torch.zeros(1, rows + 1, device=self._gpu.torch)
            self._masked = (-1, -1)
        mask = self._masks[rows]
        if self._masked != (rows, past):  # once per token, not per layer
            mask.zero_()
            mask[:, past:rows] = float("-inf")
            self._masked = (rows, past)
        return mask


def _destroy(cuda: Any, captured: dict[tuple[int, int, int], Captured]) -> None:
    while captured:
        cuda.destroy_graph(captured.popitem()[1].graph)


def bucket(past: int, capacity: int) -> int:
    """Rows that a graph for `past` rows looks at: the next power of two, at least LEAST_ROWS, at most the capacity."""
    return min(capacity, max(LEAST_ROWS, 1 << (past - 1).bit_length()))
