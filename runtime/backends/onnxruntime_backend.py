"""ONNX Runtime as back-end: the bundle's graphs, one session each, on the CPU or on a CUDA device.

Memory on the CPU: ONNX Runtime makes an fp32 copy of every weight when a session is created, in fp32 and fp16 graphs
alike: 4 bytes per weight, counted in `weight_bytes`. (Releases before 1.23 keep fp16 weights and multiply them eight
times slower; there it is an upper bound.) The stored weights are mapped only while that copy is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from runtime.arena import Arena, Slots
from runtime.backends.base import one_by_one
from runtime.backends.graph_inputs import CausalMask, no_past
from runtime.backends.onnxruntime_sessions import Provider, SessionFactory, run_session
from runtime.bundle import Bundle
from runtime.dense import load_tensors
from runtime.errors import UsageError
from runtime.graph_io import block_part, mlp_part
from runtime.kv_cache import KVCache
from runtime.layout import EMBED_FILE, HEAD_FILE, embed_tensors, head_tensors, layer_file, layer_tensors
from runtime.rope import RopeTable

_DTYPES = {torch.float16: "fp16", torch.float32: "fp32"}


class OnnxRuntimeBackend:
    """Runs the graphs of export/blocks.py. Tensors stay in host memory: a CUDA session copies what it is given."""

    name = "onnxruntime"

    def __init__(
        self, bundle: Bundle, dtype: torch.dtype, threads: int | None = None, provider: Provider = "cpu"
    ) -> None:
        """Create every session. `threads` per session; default: as many as torch uses (--threads).

        Raises UsageError when ONNX Runtime, the provider or the dtype cannot be had, BundleError for a damaged file.
        """
        self._config = bundle.config
        self.device = torch.device("cpu")
        self.arithmetic = f"ONNX Runtime, {provider}"
        self.dtype = dtype
        dtype_name = _graph_dtype(bundle, dtype)
        factory = SessionFactory(bundle, dtype_name, threads or torch.get_num_threads(), provider)
        config = bundle.config
        self._embed = load_tensors(bundle, EMBED_FILE, embed_tensors(config))["embed"]
        # The head is the greatest file: first, so that its passing copies meet an empty memory.
        self._head = self._open_head(factory)
        self._expert = factory.open("expert")
        self._blocks, self._mlps = [], {}
        for layer in range(config.num_layers):
            with factory.weights(layer_file(layer)):
                self._blocks.append(factory.open(block_part(layer)))
                if config.mlp_size(layer):
                    self._mlps[layer] = factory.open(mlp_part(layer))
        self._rope = RopeTable(config.rope)
        self._mask = CausalMask()
        self._no_past = no_past(config, dtype)

    @staticmethod
    def weight_bytes(bundle: Bundle, dtype: torch.dtype) -> int:
        """Host memory for the dense weights, bytes: fp32 in every session, and the fp16 embedding table."""
        config = bundle.config
        tables = [head_tensors(config), *(layer_tensors(config, n) for n in range(config.num_layers))]
        embedding = _values(embed_tensors(config))
        in_sessions = sum(map(_values, tables)) + (embedding if config.tied_embeddings else 0)
        return 4 * in_sessions + 2 * embedding

    def step(self, count: int) -> AbstractContextManager[None]:
        """Nothing to prepare: sessions have their own threads."""
        return nullcontext()

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [S] to x [S, H] fp32."""
        return self._embed[token_ids].float() * self._config.embed_scale

    def run_block(self, layer: int, x: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual after attention [S, H] fp32 and h [S, H]; writes the new rows into `cache`."""
        cos, sin = self._rope.rows(cache.length, x.shape[0])
        past_k, past_v = self._no_past
        if cache.length:
            past_k, past_v = (rows[layer, : cache.length] for rows in (cache.keys, cache.values))
        feeds = {
            "x": x.numpy(),
            "cos": cos.numpy(),
            "sin": sin.numpy(),
            "mask": self._mask.rows(cache.length, x.shape[0]).numpy(),
            "past_k": past_k.numpy(),
            "past_v": past_v.numpy(),
        }
        x_attn, h, keys, values = run_session(self._blocks[layer], ("x_attn", "h", "k_new", "v_new"), feeds)
        cache.write(layer, keys, values)
        return x_attn, h

    def run_mlp(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """h [S, H] to [S, H] fp32."""
        return run_session(self._mlps[layer], ("out",), {"h": h.numpy()})[0]

    def run_expert(self, h: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """h [n, H] and the fp16 values of a blob to [n, H] fp32."""
        feeds = {"h": h.numpy()}
        values, start = slot.numpy(), 0
        for name, shape in self._config.expert_shapes.items():
            end = start + math.prod(shape)
            feeds[name] = values[start:end].reshape(shape)
            start = end
        return run_session(self._expert, ("y",), feeds)[0]

    def run_experts(self, h: torch.Tensor, slots: Sequence[torch.Tensor]) -> torch.Tensor:
        """h [1, H] and several blobs' values to [len(slots), H] fp32."""
        return one_by_one(self.run_expert, h, slots)

    def run_head(self, x: torch.Tensor) -> torch.Tensor:
        """x [S, H] to logits [S, V] fp32."""
        return run_session(self._head, ("logits",), {"x": x.numpy()})[0]

    def allocate_slots(self, slots: int, slot_bytes: int, value_bytes: int) -> Slots:
        return Arena(slots, slot_bytes, value_bytes)

    def synchronise(self) -> None:
        """Nothing to wait for: a session returns when it is done."""

    def _open_head(self, factory: SessionFactory) -> Any:
        with factory.weights(HEAD_FILE):
            if not self._config.tied_embeddings:
                return factory.open("head")
            with factory.weights(EMBED_FILE):
                return factory.open("head")


def _graph_dtype(bundle: Bundle, dtype: torch.dtype) -> str:
    name = _DTYPES.get(dtype)
    if name is None:
        raise UsageError(
            f"the onnxruntime back-end computes in fp16 or fp32, not in {str(dtype).removeprefix('torch.')}"
        )
    if name not in bundle.manifest.graphs:
        raise UsageError(
            f"{bundle.path} has no {name} ONNX graphs (found: {', '.join(bundle.manifest.graphs) or 'none'}): "
            "export it again, or choose --backend torch"
        )
    return name


def _values(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in tensors.values())
