"""What only a GPU can show, check by check; bench/gpu.py runs them. Each returns {"ok": ..., figures}."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from profiles.floor import active_bytes
from runtime.backends.cuda_backend import CudaBackend
from runtime.backends.tensorrt_backend import ready
from runtime.bounce import reachable
from runtime.bundle import Bundle
from runtime.cache import ExpertCache
from runtime.cuda.arena import CudaArena
from runtime.cuda.device import Device
from runtime.engine import Engine, EngineOptions, GenerateOptions, Token
from runtime.errors import UsageError
from runtime.loader import Loader
from runtime.storage import read_file

PARITY_TOLERANCE = 1e-3  # of the range of the logits, fp32: what is left is the order of sums
HALF_TOLERANCE = 3e-2  # fp16 against fp32
_DELAY_CYCLES = 20_000_000  # about 20 ms, in which a wrong program has long overwritten the slot
_READ_BYTES = 256 << 20
Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """`slots_per_layer`: None for every expert resident. `tokens`: decoded where time is measured."""

    bundle: Path
    slots_per_layer: int | None = None
    tokens: int = 64
    context: int = 512


class NotRunError(Exception):
    """A check cannot be made here; the reason is the message."""


class Forgetful(CudaArena):
    """The negative control of the stress test: nobody waits for the kernels that read a slot."""

    def begin_write(self, slot: int) -> None:
        """See CudaArena."""


def parity(settings: Settings, gpu: Device) -> Result:
    """torch on the GPU against torch on the CPU: logits of a fixed prompt in fp32, and fp16 beside it."""
    expected = _logits(settings, "torch", "fp32")
    single, half = (_distance(_logits(settings, "cuda", dtype), expected) for dtype in ("fp32", "fp16"))
    return {"ok": single < PARITY_TOLERANCE and half < HALF_TOLERANCE, "fp32": single, "fp16": half}


def tensorrt_parity(settings: Settings, gpu: Device) -> Result:
    """Engines against torch on the CPU in fp32."""
    line = _engines(settings)
    distance = _distance(_logits(settings, "tensorrt", "fp16"), _logits(settings, "torch", "fp32"))
    return {"ok": distance < HALF_TOLERANCE, "fp16": distance, "engines": line}


def arena_reads(settings: Settings, gpu: Device) -> Result:
    """Experts read into slots as the engine reads them, then looked at through the GPU, against the files' bytes."""
    bundle = Bundle.open(settings.bundle)
    names, size = list(bundle.blobs().items())[:64], bundle.manifest.expert.file_bytes
    with gpu.stream.current():
        arena = CudaArena(gpu.cuda, gpu.stream.handle, 4, size, bundle.manifest.expert.bytes)
        cache, loader, note = _cache(bundle, arena)
        wrong = 0
        for (layer, expert), name in names:
            with cache.fetch(layer, [expert]) as request:
                for _, slot in request:
                    found = slot.cpu().view(torch.uint8).numpy().tobytes()
                    wrong += found != bytes(read_file(bundle.directory, name, size)[: len(found)])
    loader.close()
    arena.close()
    return {"ok": wrong == 0, "blobs": len(names), "wrong": wrong, "note": note or "O_DIRECT reads straight into slots"}


def slot_overwrites(settings: Settings, gpu: Device) -> Result:
    """Slots used again while delayed kernels still read them: none may see another expert. The same run without the
    events must go wrong, or it shows nothing.
    """
    guarded, wrong = _stress(settings, gpu, CudaArena)
    _, control = _stress(settings, gpu, Forgetful)
    return {"ok": wrong == 0 and control > 0, "kernels": guarded, "wrong": wrong, "wrong_without_events": control}


def prefetch_parity(settings: Settings, gpu: Device) -> Result:
    """Reads on a guess change neither the tokens nor what hits; time per token of both is told. Some must have been
    right, or it shows nothing.
    """
    plain, guessed = (_in_a_small_cache(settings, prefetch) for prefetch in (0, 1))
    same = [(token.id, token.record.hits) for token in plain] == [(token.id, token.record.hits) for token in guessed]
    right = sum(token.record.prefetched for token in guessed)
    misses = sum(sum(token.record.misses) for token in guessed[1:])
    plain_ms, guessed_ms = (statistics.median(token.record.total_ms for token in run[1:]) for run in (plain, guessed))
    return {
        "ok": same and right > 0,
        "same": same,
        "prefetched": right,
        "misses": misses,
        "plain_tpot_ms": plain_ms,
        "prefetch_tpot_ms": guessed_ms,
    }


def read_rates(settings: Settings, gpu: Device) -> Result:
    """How fast the GPU reads its own memory and page-locked memory of the machine, bytes per second."""
    rates = {}
    with gpu.stream.current():
        values = _READ_BYTES // 2
        host, mapped = gpu.cuda.host_alloc(_READ_BYTES)
        rivals = {
            "own": torch.ones(values, dtype=torch.float16, device=gpu.torch),
            "mapped": gpu.cuda.tensor(mapped, values),
        }
        rivals["mapped"].fill_(1)
        for name, tensor in rivals.items():
            seconds = min(_seconds(gpu, lambda tensor=tensor: tensor.sum()) for _ in range(5))  # type: ignore[misc]
            rates[f"{name}_bytes_per_s"] = _READ_BYTES / seconds
        gpu.cuda.synchronise(gpu.stream.handle)
    gpu.cuda.host_free(host)
    return {"ok": True, **rates}


def decode_cuda(settings: Settings, gpu: Device) -> Result:
    """Time per token of torch on the GPU, against the floor."""
    return _decode(settings, gpu, "cuda")


def decode_tensorrt(settings: Settings, gpu: Device) -> Result:
    """Time per token with TensorRT engines, against the floor."""
    _engines(settings)
    return _decode(settings, gpu, "tensorrt")


def expert_kernel(settings: Settings, gpu: Device) -> Result:
    """An expert of one token by torch and by the fused kernel: seconds each, and how far apart the results are."""
    bundle = Bundle.open(settings.bundle)
    blob = read_file(bundle.directory, sorted(bundle.blobs().values())[0], bundle.manifest.expert.file_bytes)
    slot = torch.frombuffer(blob, dtype=torch.float16)[: bundle.manifest.expert.bytes // 2].to(gpu.torch)
    backend = CudaBackend(bundle, torch.float16, gpu)
    with backend.step(1):
        h = torch.randn(1, bundle.config.hidden_size, dtype=torch.float16, device=gpu.torch)
        results, seconds = {}, {}
        for name in ("torch", "fused"):
            if name == "fused":
                _or_not_run(backend.fuse_experts)
            results[name] = backend.run_expert(h, slot).cpu()
            seconds[name] = min(_seconds(gpu, lambda: backend.run_expert(h, slot)) for _ in range(20))
    distance = _distance(results["fused"], results["torch"])
    return {
        "ok": distance < HALF_TOLERANCE,
        "distance": distance,
        "torch_s": seconds["torch"],
        "fused_s": seconds["fused"],
    }


def decode_graphs(settings: Settings, gpu: Device) -> Result:
    """The same with CUDA graphs: what decides whether they become the default."""
    _engines(settings)
    return _decode(settings, gpu, "tensorrt", graphs=True)


def graphs_parity(settings: Settings, gpu: Device) -> Result:
    """Greedy tokens with CUDA graphs against the same engines without."""
    _engines(settings)
    plain, launched = (_tokens(settings, graphs) for graphs in (False, True))
    same = next((i for i, pair in enumerate(zip(plain, launched, strict=True)) if pair[0] != pair[1]), len(plain))
    return {"ok": same >= len(plain) // 2, "tokens": len(plain), "equal_from_the_start": same}


CHECKS: dict[str, Callable[[Settings, Device], Result]] = {
    "parity": parity,
    "arena_reads": arena_reads,
    "slot_overwrites": slot_overwrites,
    "prefetch_parity": prefetch_parity,
    "tensorrt_parity": tensorrt_parity,
    "graphs_parity": graphs_parity,
    "read_rates": read_rates,
    "expert_kernel": expert_kernel,
    "decode_cuda": decode_cuda,
    "decode_tensorrt": decode_tensorrt,
    "decode_graphs": decode_graphs,
}


def _logits(settings: Settings, backend: Any, dtype: Any) -> torch.Tensor:
    options = EngineOptions(backend=backend, dtype=dtype, slots_per_layer=None, context=settings.context)
    with Engine.open(settings.bundle, options) as engine:
        return engine.logits(_prompt(engine.config.vocab_size))


def _tokens(settings: Settings, graphs: bool) -> list[int]:
    options = EngineOptions(backend="tensorrt", context=settings.context, cuda_graphs=graphs)
    with Engine.open(settings.bundle, options) as engine:
        prompt = _prompt(engine.config.vocab_size)
        return [token.id for token in engine.generate(prompt, GenerateOptions(settings.tokens, ignore_eos=True))]


def _in_a_small_cache(settings: Settings, prefetch: int) -> list[Token]:
    """Greedy tokens from a cold cache for two tokens' experts per layer."""
    rules = Bundle.open(settings.bundle).config.router
    slots = min(2 * rules.top_k, rules.num_experts - 1)
    options = EngineOptions(backend="cuda", slots_per_layer=slots, context=settings.context, prefetch=prefetch)
    with Engine.open(settings.bundle, options) as engine:
        prompt = _prompt(engine.config.vocab_size)
        return list(engine.generate(prompt, GenerateOptions(settings.tokens, ignore_eos=True)))


def _prompt(vocabulary: int) -> list[int]:
    return [(7 * i + 3) % vocabulary for i in range(32)]


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Greatest difference as a share of the expected range."""
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


def _or_not_run(work: Callable[[], object]) -> None:
    try:
        work()
    except UsageError as error:
        raise NotRunError(str(error)) from None


def _engines(settings: Settings) -> str:
    bundle = Bundle.open(settings.bundle)
    try:
        return ready(bundle, settings.context)
    except UsageError as error:
        raise NotRunError(str(error)) from None
    finally:
        bundle.close()


def _cache(bundle: Bundle, arena: CudaArena) -> tuple[ExpertCache, Loader, str]:
    """The arena as one shared pool over the blobs of a bundle."""
    storage, note = reachable(bundle.open_experts(True), (bundle.config.moe_layers[0], 0), arena.views[0])
    loader = Loader(storage, bundle.blob_checksums(), bundle.manifest.expert.file_bytes, 8)
    config = bundle.config
    return ExpertCache(config.moe_layers, config.router, arena, loader, "lru", "shared"), loader, note


def _stress(settings: Settings, gpu: Device, kind: type[CudaArena]) -> tuple[int, int]:
    """(kernels, those that saw other bytes): every kernel adds a slot's bits up after a delay."""
    bundle = Bundle.open(settings.bundle)
    chooser, size, values = random.Random(5), bundle.manifest.expert.file_bytes, bundle.manifest.expert.bytes
    experts = list(bundle.blobs())[:24]
    right = {key: _bits(torch.frombuffer(read_file(bundle.directory, bundle.blobs()[key], size), dtype=torch.float16,
                                         count=values // 2)) for key in experts}  # fmt: skip
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with gpu.stream.current():
        arena = kind(gpu.cuda, gpu.stream.handle, 2, size, values)
        cache, loader, _ = _cache(bundle, arena)
        for _ in range(100):
            layer, expert = chooser.choice(experts)
            with cache.fetch(layer, [expert]) as request:
                for _, slot in request:
                    torch.cuda._sleep(_DELAY_CYCLES)
                    seen.append((_bits(slot), right[layer, expert]))
        gpu.cuda.synchronise(gpu.stream.handle)
    loader.close()
    arena.close()
    return len(seen), sum(int(found.cpu()) != int(expected) for found, expected in seen)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16).to(torch.int64).sum()


def _decode(settings: Settings, gpu: Device, backend: Any, graphs: bool = False) -> Result:
    """The floor is what one token reads, over the rate at which this GPU reads; misses come on top of it."""
    options = EngineOptions(
        backend=backend, slots_per_layer=settings.slots_per_layer, context=settings.context, cuda_graphs=graphs
    )
    with Engine.open(settings.bundle, options) as engine:
        for _ in range(2):  # the first fills the cache
            tokens = engine.generate(
                _prompt(engine.config.vocab_size), GenerateOptions(settings.tokens, ignore_eos=True)
            )
            for _ in tokens:
                pass
        summary, size = engine.summary(), active_bytes(engine.config)
    rates = read_rates(settings, gpu)
    rate = rates["mapped_bytes_per_s"] if gpu.cuda.gpu.integrated else rates["own_bytes_per_s"]
    median = summary.tpot_ms["median"]
    floor_ms = 1000 * size / rate
    return {
        "ok": median is not None,
        "tpot_ms": summary.tpot_ms,
        "floor_ms": floor_ms,
        "over_floor": None if median is None else median / floor_ms,
        "hit_rate": summary.hit_rate,
    }


def _seconds(gpu: Device, work: Callable[[], Any]) -> float:
    gpu.cuda.synchronise(gpu.stream.handle)
    begin = time.perf_counter()
    work()
    gpu.cuda.synchronise(gpu.stream.handle)
    return time.perf_counter() - begin
