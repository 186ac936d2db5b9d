"""The TensorRT back-end's bindings, computed by ONNX Runtime through the bound addresses: equal to the ONNX Runtime
back-end bit for bit, rows in place, one scratch memory, and nothing foreign is ever deserialised.
"""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from export.exporter import export_bundle
from runtime import backends
from runtime.backends import cuda_backend, tensorrt_backend, tensorrt_engine, tensorrt_graphs
from runtime.backends.cuda_backend import CudaBackend
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.backends.tensorrt_backend import TensorRTBackend, find_options, ready
from runtime.backends.tensorrt_graphs import bucket
from runtime.budget import plan_run
from runtime.bundle import Bundle
from runtime.cuda.driver import Gpu
from runtime.engine import Engine, EngineOptions, GenerateOptions
from runtime.engine_store import EngineLimits as Limits
from runtime.engine_store import EngineStore, engine_keys
from runtime.errors import EdgeError, UsageError
from runtime.kv_cache import KVCache
from tests.checkpoints import make_checkpoint
from tests.parity.dense_models import MODELS, make_bundle
from tests.unit.fake_cuda import DISCRETE, ORIN, FakeCuda
from tests.unit.fake_engine import TARGET, fake_device, fake_library, store_engines

LIMITS = Limits(context=48, prefill=16)
HALF = torch.float16
Log = list[tuple[Any, ...]]


@pytest.fixture(autouse=True)
def cpu_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's memory on the CPU starts at multiples of 64, not of 256."""
    monkeypatch.setattr(tensorrt_engine, "ALIGNMENT", 64)
    monkeypatch.setattr(tensorrt_backend, "ALIGNMENT", 64)


def make(
    name: str, tmp_path: Path, log: Log, without: tuple[str, ...] = (), context: int = 40, graphs: bool = False
) -> TensorRTBackend:
    cuda = FakeCuda(eager=1.0)
    bundle = Bundle.open(make_bundle(tmp_path / "b", MODELS[name]).path)
    store = EngineStore(bundle.manifest, tmp_path / "store")
    store_engines(bundle, store, LIMITS)
    library = fake_library(log, without, cuda)
    return TensorRTBackend(bundle, HALF, context, fake_device(cuda), library, store, graphs)


@pytest.mark.parametrize("name", ["gqa-bias-gate", "mqa-gelu-tied", "head-norm-no-mlp", "mla"])
def test_equal_to_onnx_runtime_bit_for_bit(name: str, tmp_path: Path) -> None:
    """A prompt of 9, one of 1, a second piece of 5, then tokens: every part of every layer, and the cache's rows."""
    backend, config = make(name, tmp_path, []), MODELS[name]
    reference = OnnxRuntimeBackend(Bundle.open(tmp_path / "b"), HALF, threads=1)
    caches = [KVCache(config, 48, HALF, torch.device("cpu")) for _ in range(2)]
    random = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        for count in (9, 1, 5, 1, 1, 1):
            x = torch.randn(count, config.hidden_size, generator=random)
            for layer in range(config.num_layers):
                found, expected = (b.run_block(layer, x, c) for b, c in zip((backend, reference), caches, strict=True))
                assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
                if config.mlp_size(layer):
                    assert torch.equal(backend.run_mlp(layer, found[1]), reference.run_mlp(layer, expected[1]))
            assert torch.equal(backend.run_head(x), reference.run_head(x))
            for cache in caches:
                cache.advance(count)
        assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].values, caches[1].values)
        assert caches[0].keys[1, 17].any() and not caches[0].keys[:, 18:].any()


def test_rows_are_bound_in_place_and_scratch_is_shared(tmp_path: Path) -> None:
    log: Log = []
    backend = make("gqa-bias-gate", tmp_path, log)
    cache = KVCache(MODELS["gqa-bias-gate"], 48, HALF, torch.device("cpu"))
    x = torch.zeros(1, 64)
    for length in (0, 1, 2):
        cache.length = length
        for layer in (0, 1):
            backend.run_block(layer, x, cache)
        backend.run_head(x)
    calls = [entry for entry in log if entry[0] == "enqueue"]
    assert [call[1] for call in calls] == ["layer_00", "layer_01", "head"] * 3
    assert {call[2] for call in calls} == {0}  # one token: the decoding profile
    assert len({call[5] for call in calls}) == 1  # one scratch memory
    for number, (_, part, _, shapes, addresses, _) in enumerate(calls):
        if part != "head":
            length, layer = number // 3, int(part[-2:])
            assert addresses["k_new"] == cache.keys[layer, length].data_ptr()
            assert addresses["v_new"] == cache.values[layer, length].data_ptr()
            # Without a past, one row that the mask hides; it is no row of the cache.
            assert shapes["past_k"] == (max(length, 1), 2, 16) and shapes["mask"] == (1, max(length, 1) + 1)
            assert (addresses["past_k"] == cache.keys[layer].data_ptr()) == (length > 0)


@pytest.mark.parametrize(
    ("past", "capacity", "rows"),
    [(1, 4096, 64), (64, 4096, 64), (65, 4096, 128), (129, 4096, 256), (3000, 4096, 4096), (40, 48, 48)],
)
def test_buckets(past: int, capacity: int, rows: int) -> None:
    assert bucket(past, capacity) == rows


@pytest.mark.parametrize("name", ["gqa-bias-gate", "mla"])
def test_decoding_as_cuda_graphs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, then tokens through two buckets of 8 and 16 rows: the first token of a bucket runs and is written down,
    the others are launched; results and rows are those of ONNX Runtime, which looks at no padding.
    """
    monkeypatch.setattr(tensorrt_graphs, "LEAST_ROWS", 8)
    log, config = Log(), MODELS[name]
    backend = make(name, tmp_path, log, graphs=True)
    cuda: FakeCuda = backend._gpu.cuda
    reference = OnnxRuntimeBackend(Bundle.open(tmp_path / "b"), HALF, threads=1)
    caches = [KVCache(config, 64, HALF, torch.device("cpu")) for _ in range(2)]
    random = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        for count in (5, 1, 1, 1, 1, 1):
            x = torch.randn(count, config.hidden_size, generator=random)
            kept = []
            for layer in range(2):
                found, expected = (b.run_block(layer, x, c) for b, c in zip((backend, reference), caches, strict=True))
                kept.append((found[0], found[0].clone()))
                torch.testing.assert_close(found[0], expected[0], atol=2e-3, rtol=2e-3)
                torch.testing.assert_close(found[1], expected[1], atol=5e-3, rtol=5e-3)
            assert all(torch.equal(*pair) for pair in kept)  # a result is not written over by the next layer
            for cache in caches:
                cache.advance(count)
    torch.testing.assert_close(caches[0].keys, caches[1].keys, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(caches[0].values, caches[1].values, atol=5e-3, rtol=5e-3)
    # After 5 to 8 rows tokens decode in the bucket of 8, after 9 in that of 16: two graphs for each of two layers.
    assert [entry[0] for entry in log if entry[0] in ("enqueue", "capture")] == ["enqueue"] * 2 + [
        "enqueue", "capture", "enqueue", "capture"] * 2  # fmt: skip
    captures = [entry for entry in log if entry[0] == "capture"]
    assert [entry[3]["past_k"][0] for entry in captures] == [8, 8, 16, 16]
    assert sum(entry[0] == "launch" for entry in cuda.log) == 5 * 2 - 4
    assert len(cuda._graphs) == len(captures)
    del backend
    gc.collect()
    assert not cuda._graphs, "graphs outlive their back-end"


def test_only_changed_shapes_are_told(tmp_path: Path) -> None:
    """Of a block's six inputs only mask and past grow from token to token."""
    log: Log = []
    backend = make("gqa-bias-gate", tmp_path, log)
    cache = KVCache(MODELS["gqa-bias-gate"], 48, HALF, torch.device("cpu"))
    for length in (4, 5):
        cache.length = length
        del log[:]
        backend.run_block(0, torch.zeros(1, 64), cache)
    assert [entry[3] for entry in log if entry[0] == "shape"] == ["mask", "past_k", "past_v"]
    backend.run_block(0, torch.zeros(16, 64), cache)
    assert log[-1][:3] == ("enqueue", "layer_00", 1)


def test_every_engine_is_deserialised_once_in_order(tmp_path: Path) -> None:
    log: Log = []
    make("gqa-bias-gate", tmp_path, log)
    parts = ["layer_00", "mlp_00", "layer_01", "mlp_01", "head"]
    assert log == [("deserialise", part) for part in parts]


@pytest.mark.parametrize(
    "without", [(), ("set_device_memory", "device_memory_size_v2"), ("ExecutionContextAllocationStrategy",)]
)
def test_features_by_release(without: tuple[str, ...], tmp_path: Path) -> None:
    backend = make("mha", tmp_path, [], without)
    assert backend.run_head(torch.zeros(1, 64)).shape == (1, 96)


def test_what_tensorrt_refuses_is_an_error(tmp_path: Path) -> None:
    """More rows of past than the engine was built for: refused by name, not computed."""
    backend = make("mha", tmp_path, [])
    cache = KVCache(MODELS["mha"], 64, HALF, torch.device("cpu"))
    cache.length = 49
    refusal = r"layer_00: TensorRT 10\.3\.0 refuses input mask of shape \(1, 50\) \(ERROR: out of range\)"
    with pytest.raises(EdgeError, match=refusal):
        backend.run_block(0, torch.zeros(1, 64), cache)


def test_an_engine_of_another_graph_is_refused(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "b", MODELS["mha"]).path)
    other = Bundle.open(make_bundle(tmp_path / "other", MODELS["gqa-bias-gate"]).path)
    store = EngineStore(bundle.manifest, tmp_path / "store")
    store_engines(bundle, store, LIMITS)
    key = engine_keys(bundle, TARGET, LIMITS)["layer_01"]
    keep = store.read(key)
    store.begin(key).write_bytes(bytes(keep).replace(str(bundle.path).encode(), str(other.path).encode()))
    store.commit(key, {})
    with pytest.raises(UsageError, match=r"layer_01: the engine has the tensors .* and 2 profiles, expected"):
        TensorRTBackend(bundle, HALF, 8, fake_device(), fake_library([]), store)


def test_a_changed_engine_is_never_deserialised(tmp_path: Path) -> None:
    bundle, log = Bundle.open(make_bundle(tmp_path / "b", MODELS["mha"]).path), Log()
    store = EngineStore(bundle.manifest, tmp_path / "store")
    store_engines(bundle, store, LIMITS)
    path = store.find(engine_keys(bundle, TARGET, LIMITS)["layer_00"]).path  # type: ignore[union-attr]
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="changed since it was built"):
        TensorRTBackend(bundle, HALF, 8, fake_device(), fake_library(log), store)
    assert log == []


def test_which_engines_a_run_takes(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "b", MODELS["mha"]).path)
    store = EngineStore(bundle.manifest, tmp_path / "store")
    command = f"run edge engines {bundle.path} --context 48"
    with pytest.raises(UsageError, match=r"\(none are built\)") as caught:
        find_options(bundle, TARGET, store, 48)
    assert str(caught.value).endswith(command)
    for context in (16, 48, 96):
        store_engines(bundle, store, Limits(context, 16))
    assert find_options(bundle, TARGET, store, 48).context == 48
    assert find_options(bundle, TARGET, store, 49).context == 96
    with pytest.raises(UsageError, match="look back at 96 tokens, this run at 97"):
        find_options(bundle, TARGET, store, 97)
    for part in ("mlp_00", "head"):
        store.find(engine_keys(bundle, TARGET, Limits(96, 16))[part]).path.unlink()  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="look back at 48 tokens|2 of 5 engines are missing, mlp_00 first"):
        find_options(bundle, TARGET, store, 90)


def test_fp16_only(tmp_path: Path) -> None:
    bundle = Bundle.open(make_bundle(tmp_path / "b", MODELS["mha"]).path)
    with pytest.raises(UsageError, match="engines compute in fp16, not in float32: --dtype fp16"):
        TensorRTBackend(bundle, torch.float32, 8, fake_device(), fake_library([]))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    export_bundle(str(make_checkpoint(folder / "checkpoint", "qwen2_moe")), folder / "bundle")
    return folder / "bundle"


def generate(bundle: Path, **options: Any) -> tuple[list[int], torch.Tensor]:
    with Engine.open(bundle, EngineOptions(slots_per_layer=4, context=32, **options)) as engine:
        tokens = [token.id for token in engine.generate([5, 6, 7, 8, 9], GenerateOptions(12, ignore_eos=True))]
        engine.check_integrity()
        return tokens, engine.logits([5, 6, 7, 8, *tokens])


@pytest.mark.parametrize("gpu", [ORIN, DISCRETE], ids=["integrated", "discrete"])
def test_an_engine_on_a_gpu_says_what_one_on_the_cpu_says(
    experts: Path, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch in fp32 through the arena of a GPU: the same numbers as the torch back-end, bit for bit."""
    cuda = FakeCuda(gpu, eager=1.0)
    monkeypatch.setattr(cuda_backend, "open_device", lambda: fake_device(cuda))
    expected, found = (generate(experts, backend=name, dtype="fp32") for name in ("torch", "cuda"))
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    assert cuda.allocated == 0  # closed with the engine
    assert sum(name == "record" for name, *_ in cuda.log) > 12 * 3 * 3


def test_tokens_through_engines(experts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole way of a token over the TensorRT back-end, against ONNX Runtime in fp16; experts are torch's."""
    monkeypatch.setenv("REMOE_EDGE_ENGINES", str(tmp_path / "store"))
    bundle = Bundle.open(experts)
    store_engines(bundle, EngineStore(bundle.manifest), Limits(32, 16))
    monkeypatch.setattr(tensorrt_backend, "open_device", fake_device)
    monkeypatch.setattr(tensorrt_backend, "load", lambda: fake_library([]))
    expected, found = (generate(experts, backend=name, dtype="fp16") for name in ("onnxruntime", "tensorrt"))
    spread = float(expected[1].max() - expected[1].min())
    assert (found[1] - expected[1]).abs().max() < 4e-3 * spread
    assert found[0][:4] == expected[0][:4]


def test_fused_experts_for_single_tokens_only(experts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token goes to the kernel with the addresses of its row, its slot and the result; a prompt goes to torch."""
    calls: list[tuple[int, ...]] = []
    bundle = Bundle.open(experts)
    backend = CudaBackend(bundle, HALF, fake_device())
    backend.fuse_experts(SimpleNamespace(run=lambda *places, stream: calls.append((*places, stream))))  # type: ignore[arg-type]
    h, slot = torch.ones(2, bundle.config.hidden_size, dtype=HALF), torch.ones(bundle.manifest.expert.bytes // 2).half()
    backend.run_expert(h, slot)
    assert calls == []
    y = backend.run_expert(h[1:], slot)
    assert calls == [(h[1].data_ptr(), slot.data_ptr(), backend._mixed.data_ptr(), y.data_ptr(), 7)]
    assert y.dtype == torch.float32 and backend.arithmetic == "torch on Orin, fused experts"
    with pytest.raises(UsageError, match="--dtype fp16, or --expert-kernel torch"):
        CudaBackend(bundle, torch.float32, fake_device()).fuse_experts()
    with pytest.raises(UsageError, match="--expert-kernel fused runs on a GPU, but the back-end is torch"):
        Engine.open(experts, EngineOptions(backend="torch", slots_per_layer=4, context=32, expert_kernel="fused"))


def test_memory_of_a_run_on_a_gpu(experts: Path) -> None:
    """The context of a process on an Orin, and one file at a time in ordinary memory while loading."""
    bundle = Bundle.open(experts)
    sizes = {name: backends.weight_bytes(name, bundle, HALF) for name in ("torch", "cuda", "tensorrt")}
    assert sizes["cuda"] == sizes["tensorrt"] == sizes["torch"] + 300_000_000
    largest = max(entry.bytes for name, entry in bundle.manifest.files.items() if name.startswith("dense/"))
    for name, loading in (("torch", 0), ("cuda", largest), ("tensorrt", largest)):
        assert plan_run(bundle, EngineOptions(slots_per_layer=4), name, HALF, 32, [])[1].loading_bytes == loading


def test_graphs_are_for_engines(experts: Path) -> None:
    with pytest.raises(UsageError, match="the back-end is torch: --backend tensorrt"):
        Engine.open(experts, EngineOptions(backend="torch", slots_per_layer=4, context=32, cuda_graphs=True))


def test_auto_says_which_and_why(experts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backends, "has_nvidia_gpu", lambda: False)
    bundle = Bundle.open(experts)
    assert backends.choose("auto", bundle) == ("torch", "torch: the default on a CPU")
    monkeypatch.setattr(backends, "has_nvidia_gpu", lambda: True)
    name, reason = backends.choose("auto", bundle, 32)  # really asks: this machine has the node but no driver
    assert name in ("torch", "cuda", "tensorrt")
    if name == "torch":
        assert reason.startswith("torch: the default on a CPU; there is a GPU, but ")
    monkeypatch.setenv("REMOE_EDGE_ENGINES", str(tmp_path / "store"))
    monkeypatch.setattr("runtime.cuda.device.open_device", fake_device)
    monkeypatch.setattr(tensorrt_backend, "load", lambda: fake_library([]))
    monkeypatch.setattr(tensorrt_backend, "Cuda", FakeCuda)
    name, reason = backends.choose("auto", bundle, 32)
    assert name == "cuda"
    assert reason.startswith("cuda: torch computes on Orin; not tensorrt: no TensorRT engines of ")
    assert f"run edge engines {experts} --context 32" in reason
    store_engines(bundle, EngineStore(bundle.manifest), Limits(32, 16))
    assert ready(bundle, 32) == "engines of TensorRT 10.3.0 for Orin are built"
    assert backends.choose("auto", bundle, 32)[0] == "tensorrt"
