"""TensorRT as back-end: the dense parts run as engines of the private store, the experts in torch from their slots.

A block's new rows are bound in place: its outputs k_new and v_new point at the next free rows of the runtime's cache,
so nothing is copied. Rows whose addresses TensorRT cannot take (latent attention's short rope keys, every other one) go
through a small buffer. All parts work in one scratch memory, one after the other on one stream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from runtime.backends.cuda_backend import GpuBackend
from runtime.backends.graph_inputs import CausalMask, no_past
from runtime.backends.tensorrt_engine import ALIGNMENT, DECODE, PREFILL, Loader, Part
from runtime.backends.tensorrt_graphs import DecodeGraphs
from runtime.backends.tensorrt_library import Library, load
from runtime.bundle import Bundle
from runtime.cuda.device import Device, open_device
from runtime.cuda.driver import Cuda
from runtime.engine_store import EngineLimits, EngineStore, Target, engine_keys
from runtime.errors import UsageError
from runtime.graph_io import block_part, mlp_part, part_io
from runtime.kv_cache import KVCache
from runtime.rope import RopeTable

Rows = tuple[torch.Tensor, torch.Tensor]


class TensorRTBackend(GpuBackend):
    """Engines built by `edge engines` for exactly this bundle, TensorRT and GPU; nothing else is ever deserialised."""

    name = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        dtype: torch.dtype,
        context: int,
        gpu: Device | None = None,
        library: Library | None = None,
        store: EngineStore | None = None,
        graphs: bool = False,
    ) -> None:
        """`context`: rows of past that the run may reach. `graphs`: launch the blocks of single tokens as CUDA graphs.

        Raises UsageError where TensorRT, a GPU or an engine is missing, and names the command that mends it.
        """
        if dtype != torch.float16:
            raise UsageError(f"engines compute in fp16, not in {str(dtype).removeprefix('torch.')}: --dtype fp16")
        library, gpu = library or load(), gpu or open_device()
        store = store or EngineStore(bundle.manifest)
        target = Target(library.flavour, library.version, gpu.cuda.gpu.identity)
        options = find_options(bundle, target, store, context)
        super().__init__(bundle, dtype, gpu)
        self.arithmetic = f"{library}, experts in torch, on {gpu.cuda.gpu.name}"
        with gpu.stream.current():
            self._parts = self._load_parts(bundle, library, store, target, options)
            self._scratch_memory = self._share_scratch()
        self._graphs = DecodeGraphs(self._config, gpu, self._parts) if graphs else None
        self.arithmetic += ", as CUDA graphs" if graphs else ""
        self._rope = RopeTable(self._config.rope, self.device)
        self._mask = CausalMask(self.device)
        self._no_past = no_past(self._config, dtype, self.device)

    def run_block(self, layer: int, x: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        count, past = len(x), cache.length
        if self._graphs is not None and count == 1 and past and _starts_aligned(cache, layer):
            return self._graphs.run_block(layer, x, self._rope.rows(past, 1), cache)
        cos, sin = self._rope.rows(past, count)
        past_k, past_v = (rows[layer, :past] for rows in (cache.keys, cache.values)) if past else self._no_past
        inputs = {"x": x, "cos": cos, "sin": sin, "mask": self._mask.rows(past, count)}
        x_attn, h = torch.empty_like(x), torch.empty(x.shape, dtype=self.dtype, device=self.device)
        new, finish = _next_rows(cache, layer, count)
        self._run(
            block_part(layer),
            {**inputs, "past_k": past_k, "past_v": past_v},
            {"x_attn": x_attn, "h": h, "k_new": new[0], "v_new": new[1]},
        )
        finish()
        return x_attn, h

    def run_mlp(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        out = torch.empty(h.shape, dtype=torch.float32, device=self.device)
        self._run(mlp_part(layer), {"h": h}, {"out": out})
        return out

    def run_head(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.empty(len(x), self._config.vocab_size, dtype=torch.float32, device=self.device)
        self._run("head", {"x": aligned(x)}, {"logits": logits})
        return logits

    def _run(self, part: str, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> None:
        first = next(iter(inputs.values()))
        profile = DECODE if len(first) == 1 else PREFILL
        inputs = {name: aligned(tensor) for name, tensor in inputs.items()}
        self._parts[part].run(profile, inputs, outputs, self._gpu.stream.handle)

    def _load_parts(
        self, bundle: Bundle, library: Library, store: EngineStore, target: Target, options: EngineLimits
    ) -> dict[str, Part]:
        loader, stream = Loader(library), self._gpu.stream.handle
        parts = {}
        for name, key in engine_keys(bundle, target, options).items():
            parts[name] = Part(loader, name, store.read(key), part_io(self._config, name), stream)
        return parts

    def _share_scratch(self) -> torch.Tensor:
        """One memory as large as the greediest part needs."""
        size = max(part.scratch_bytes for part in self._parts.values())
        memory = torch.empty(max(size, ALIGNMENT), dtype=torch.uint8, device=self.device)
        for part in self._parts.values():
            part.use_scratch(memory.data_ptr(), size)
        return memory


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy of it where TensorRT could not take its address."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 and tensor.is_contiguous() else tensor.clone()


def _starts_aligned(cache: KVCache, layer: int) -> bool:
    return all(rows[layer].data_ptr() % ALIGNMENT == 0 for rows in (cache.keys, cache.values))


def find_options(bundle: Bundle, target: Target, store: EngineStore, context: int) -> EngineLimits:
    """What this bundle's engines were built with: the smallest context that is enough. Raises UsageError when a part
    has no engine.
    """
    best: tuple[int, str] | None = None
    for options in store.built_options():
        keys = engine_keys(bundle, target, options)
        missing = [part for part, key in keys.items() if store.find(key) is None]
        if not missing and options.context >= context:
            return options
        if not missing:
            best = (0, f"the engines look back at {options.context} tokens, this run at {context}")
        elif best is None or len(missing) < best[0]:
            best = (len(missing), f"{len(missing)} of {len(keys)} engines are missing, {missing[0]} first")
    found = best[1] if best else "none are built"
    raise UsageError(
        f"no TensorRT engines of {bundle.path} for {target.flavour} {target.version} on {target.gpu} ({found}): run "
        f"edge engines {bundle.path} --context {context}"
    )


def ready(bundle: Bundle, context: int) -> str:
    """A line about the engines, where every one of a run is built. Raises UsageError otherwise."""
    library = load()
    gpu = Cuda().gpu
    find_options(bundle, Target(library.flavour, library.version, gpu.identity), EngineStore(bundle.manifest), context)
    return f"engines of {library} for {gpu.name} are built"


def _next_rows(cache: KVCache, layer: int, count: int) -> tuple[Rows, Callable[[], None]]:
    """Where a block writes the rows of `count` tokens, and what is to be done afterwards."""
    start, end = cache.length, cache.length + count
    places = [rows[layer, start:end] for rows in (cache.keys, cache.values)]
    targets = [p if p.data_ptr() % ALIGNMENT == 0 else torch.empty_like(p) for p in places]

    def finish() -> None:
        for place, target in zip(places, targets, strict=True):
            if target is not place:
                place.copy_(target)

    return (targets[0], targets[1]), finish
