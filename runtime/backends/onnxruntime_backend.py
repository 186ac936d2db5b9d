"""ONNX Runtime as back-end: the bundle's graphs, one session each, on the CPU or on a CUDA device.

Memory on the CPU: ONNX Runtime makes an fp32 copy of every weight when a session is created, in fp32 and fp16 graphs
alike: 4 bytes per weight, counted in `weight_bytes`. (Releases before 1.23 keep fp16 weights and multiply them eight
times slower; there it is an upper bound.) The stored weights are mapped only while that copy is made.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
import xxhash

from runtime.arena import Arena, Slots
from runtime.bundle import Bundle
from runtime.dense import load_tensors
from runtime.errors import BundleError, EdgeError, UsageError
from runtime.kv_cache import KVCache
from runtime.layout import EMBED_FILE, HEAD_FILE, embed_tensors, graph_file, head_tensors, layer_file, layer_tensors
from runtime.rope import RopeTable
from runtime.storage import open_file

_DTYPES = {torch.float16: "fp16", torch.float32: "fp32"}
_NUMPY = {torch.float16: np.float16, torch.float32: np.float32}
_CHUNK_BYTES = 16 << 20
_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
_CUDA_CURE = (
    "run `pip uninstall onnxruntime onnxruntime-gpu` and `pip install 'remoe-edge[onnxruntime-gpu]'` with a matching "
    "CUDA, or choose --backend torch"
)
Arrays = dict[str, np.ndarray]


class OnnxRuntimeBackend:
    """Runs the graphs of export/blocks.py. Tensors stay in host memory: a CUDA session copies what it is given."""

    name = "onnxruntime"

    def __init__(
        self, bundle: Bundle, dtype: torch.dtype, threads: int | None = None, provider: Literal["cpu", "cuda"] = "cpu"
    ) -> None:
        """Create every session. `threads` per session; default: as many as torch uses (--threads).

        Raises UsageError when ONNX Runtime, the provider or the dtype cannot be had, BundleError for a damaged file.
        """
        self._config = bundle.config
        self.device = torch.device("cpu")
        self.arithmetic = f"ONNX Runtime, {provider}"
        self.dtype = dtype
        dtype_name = _graph_dtype(bundle, dtype)
        factory = _SessionFactory(bundle, dtype_name, threads or torch.get_num_threads(), provider)
        config = bundle.config
        self._embed = load_tensors(bundle, EMBED_FILE, embed_tensors(config))["embed"]
        # The head is the greatest file: first, so that its passing copies meet an empty memory.
        self._head = self._open_head(factory)
        self._expert = factory.open("expert")
        self._blocks, self._mlps = [], {}
        for layer in range(config.num_layers):
            with factory.weights(layer_file(layer)):
                self._blocks.append(factory.open(f"layer_{layer:02d}"))
                if config.mlp_size(layer):
                    self._mlps[layer] = factory.open(f"mlp_{layer:02d}")
        self._rope = RopeTable(config.rope)
        self._mask: tuple[tuple[int, int], np.ndarray] = ((0, 0), np.zeros((0, 0), dtype=np.float32))
        self._no_past = [np.zeros((1, *row), _NUMPY[dtype]) for row in config.attention.cache_rows]

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
            past_k, past_v = (rows[layer, : cache.length].numpy() for rows in (cache.keys, cache.values))
        feeds = {
            "x": x.numpy(),
            "cos": cos.numpy(),
            "sin": sin.numpy(),
            "mask": self._causal_mask(cache.length, x.shape[0]),
            "past_k": past_k,
            "past_v": past_v,
        }
        x_attn, h, keys, values = _run(self._blocks[layer], ("x_attn", "h", "k_new", "v_new"), feeds)
        cache.write(layer, keys, values)
        return x_attn, h

    def run_mlp(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """h [S, H] to [S, H] fp32."""
        return _run(self._mlps[layer], ("out",), {"h": h.numpy()})[0]

    def run_expert(self, h: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """h [n, H] and the fp16 values of a blob to [n, H] fp32."""
        feeds = {"h": h.numpy()}
        values, start = slot.numpy(), 0
        for name, shape in self._config.expert_shapes.items():
            end = start + math.prod(shape)
            feeds[name] = values[start:end].reshape(shape)
            start = end
        return _run(self._expert, ("y",), feeds)[0]

    def run_head(self, x: torch.Tensor) -> torch.Tensor:
        """x [S, H] to logits [S, V] fp32."""
        return _run(self._head, ("logits",), {"x": x.numpy()})[0]

    def allocate_slots(self, slots: int, slot_bytes: int, value_bytes: int) -> Slots:
        return Arena(slots, slot_bytes, value_bytes)

    def synchronise(self) -> None:
        """Nothing to wait for: a session returns when it is done."""

    def _open_head(self, factory: _SessionFactory) -> Any:
        with factory.weights(HEAD_FILE):
            if not self._config.tied_embeddings:
                return factory.open("head")
            with factory.weights(EMBED_FILE):
                return factory.open("head")

    def _causal_mask(self, past: int, count: int) -> np.ndarray:
        """[S, T + S]: token i sees the past and new tokens up to itself; without a past, T is one hidden row.

        Kept for the next layers. The graphs know no T = 0: products with an empty past kill ONNX Runtime up to 1.31
        (a division by zero in its fused transpose and product).
        """
        if self._mask[0] != (past, count):
            hidden = np.full((count, count), -np.inf, dtype=np.float32)
            before = np.full((count, max(past, 1)), 0 if past else -np.inf, dtype=np.float32)
            self._mask = (past, count), np.concatenate([before, np.triu(hidden, 1)], axis=1)
        return self._mask[1]


class _SessionFactory:
    """Opens checked graphs of one bundle as sessions with equal options."""

    def __init__(self, bundle: Bundle, dtype_name: str, threads: int, provider: str) -> None:
        self._ort = _import_onnxruntime()
        self._bundle = bundle
        self._dtype_name = dtype_name
        self._threads = threads
        self._provider = provider
        if provider not in _PROVIDERS:
            raise UsageError(f"ONNX Runtime provider {provider!r} is unknown (known: {', '.join(_PROVIDERS)})")
        available = self._ort.get_available_providers()
        if _PROVIDERS[provider][0] not in available:
            raise UsageError(
                f"ONNX Runtime on CUDA was asked for, but the installed package offers {', '.join(available)}: "
                + _CUDA_CURE
            )

    @contextmanager
    def weights(self, file: str) -> Iterator[None]:
        """Check a file of weights; afterwards its pages leave the page cache, where the sessions found them."""
        entry = self._bundle.manifest.files[file]
        descriptor = open_file(self._bundle.directory, file, entry.bytes)
        try:
            digest = xxhash.xxh3_64()
            while chunk := os.read(descriptor, _CHUNK_BYTES):
                digest.update(chunk)
            if digest.hexdigest() != entry.xxh3:
                raise BundleError(
                    f"{file}: checksum {digest.hexdigest()}, expected {entry.xxh3}: the bundle is damaged; export it "
                    "again"
                )
            yield
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def open(self, part: str) -> Any:
        """The session of one part. Raises BundleError when its graph is changed or refused."""
        file = graph_file(part, self._dtype_name)
        graph = self._bundle.read(file)
        found, expected = hashlib.sha256(graph).hexdigest(), self._bundle.manifest.files[file].sha256
        if found != expected:  # before anything parses it
            raise BundleError(f"{file}: SHA-256 {found}, expected {expected}: the bundle is damaged; export it again")
        try:
            session = self._ort.InferenceSession(bytes(graph), self._options(), providers=_PROVIDERS[self._provider])
        except Exception as error:  # ONNX Runtime has one exception class per status code
            raise BundleError(f"{file}: ONNX Runtime refuses the graph: {_first_line(error)}") from error
        if self._provider == "cuda":
            _require_cuda(session, file)
        return session

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Both grow with every new number of cached tokens and never shrink.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        entries = {
            "session.intra_op.allow_spinning": "0",  # the reader threads need the cores
            "session.model_external_initializers_file_folder_path": f"/proc/self/fd/{self._bundle.directory}/dense",
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        return options


def _values(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in tensors.values())


def _run(session: Any, outputs: Sequence[str], feeds: Arrays) -> list[torch.Tensor]:
    """Run a session on numpy views of CPU tensors; the results are tensors over ONNX Runtime's memory."""
    try:
        return [torch.from_numpy(array) for array in session.run(outputs, feeds)]
    except Exception as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        raise EdgeError(f"ONNX Runtime failed on {shapes}: {_first_line(error)}: try --backend torch") from error


def _require_cuda(session: Any, file: str) -> None:
    """A session that quietly runs on the CPU is an error. Whether kernels really run shows in the first step."""
    session.disable_fallback()
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise UsageError(f"{file}: ONNX Runtime fell back to {session.get_providers()} from CUDA: " + _CUDA_CURE)


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


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"onnxruntime is not usable ({error}): pip install 'remoe-edge[onnxruntime]'") from None
    return onnxruntime


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]
