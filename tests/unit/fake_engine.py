"""The half of TensorRT that runs engines, played by ONNX Runtime: an engine here is the name of a part's graph, and a
context reads and writes the addresses that it was given. It refuses what TensorRT refuses: a call without a profile, a
shape outside of it, an address that is missing, scratch memory that is too small.
"""

from __future__ import annotations

import ctypes
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from export.engine_build import shape_ranges
from runtime.backends.tensorrt_library import Library
from runtime.bundle import Bundle
from runtime.cuda.device import Device
from runtime.engine_store import EngineLimits, EngineStore, Target, engine_keys
from runtime.graph_io import PartIO, TensorIO, part_io
from runtime.layout import graph_file
from tests.unit.fake_cuda import ORIN, FakeCuda
from tests.unit.fake_tensorrt import FLOAT, HALF, Severity, _Logger

STREAM = 7
TARGET = Target("tensorrt", "10.3.0", ORIN.identity)
_NUMPY = {"fp16": np.float16, "fp32": np.float32}


class NullStream:
    """A stream that torch on the CPU is always in."""

    handle = STREAM

    def __init__(self) -> None:
        self.entered = 0

    def current(self) -> Any:
        from contextlib import nullcontext

        self.entered += 1
        return nullcontext()


def fake_device(cuda: FakeCuda | None = None) -> Device:
    """torch on the CPU behind the driver's fake, whose copies are done at once because torch does not wait."""
    cuda = cuda or FakeCuda(eager=1.0)
    cuda._streams.setdefault(STREAM, type(cuda._streams[0])())
    return Device(torch.device("cpu"), cuda, NullStream())


def store_engines(bundle: Bundle, store: EngineStore, options: EngineLimits, target: Target = TARGET) -> None:
    """What `edge engines` leaves behind."""
    for part, key in engine_keys(bundle, target, options).items():
        text = {"part": part, "bundle": str(bundle.path), "context": options.context, "prefill": options.prefill}
        store.begin(key).write_bytes(json.dumps(text).encode())
        store.commit(key, {})


def fake_library(log: list[tuple[Any, ...]], without: tuple[str, ...] = (), cuda: FakeCuda | None = None) -> Library:
    """TensorRT 10.3 as far as running goes; with `cuda`, calls can be captured in its graphs."""
    strategies = SimpleNamespace(USER_MANAGED="user managed", STATIC="static")
    module = SimpleNamespace(
        __version__=TARGET.version,
        ILogger=_Logger,
        Runtime=lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda data: _Engine(log, data, without, cuda, logger)
        ),
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
        float16=HALF,
        float32=FLOAT,
    )
    if "ExecutionContextAllocationStrategy" not in without:
        module.ExecutionContextAllocationStrategy = strategies
    return Library(module, "tensorrt", TARGET.version)


class _Engine:
    num_optimization_profiles = 2

    def __init__(
        self, log: list[tuple[Any, ...]], data: memoryview, without: tuple[str, ...], cuda: FakeCuda | None, logger: Any
    ) -> None:
        import onnxruntime

        self.cuda, self.logger = cuda, logger

        text = json.loads(bytes(data))
        self.part, self.log, self.without = text["part"], log, without
        log.append(("deserialise", self.part))
        config = Bundle.open(text["bundle"]).config
        self.io: PartIO = part_io(config, self.part)
        self.ranges = shape_ranges(config, self.part, EngineLimits(text["context"], text["prefill"]))
        self._tensors = {tensor.name: tensor for tensor in (*self.io.inputs, *self.io.outputs)}
        path = str(Path(text["bundle"]) / graph_file(self.part, "fp16"))
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.num_io_tensors = len(self._tensors)
        self.scratch_bytes = 1000 + len(self.part)
        if "device_memory_size_v2" not in without:
            self.device_memory_size_v2 = self.scratch_bytes
        else:
            self.device_memory_size = self.scratch_bytes

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in {tensor.name for tensor in self.io.inputs} else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return HALF if self._tensors[name].dtype == "fp16" else FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(dim, str) else dim for dim in self._tensors[name].dims)

    def create_execution_context(self, strategy: str) -> _Context:
        assert strategy == "user managed"
        return _Context(self)

    def create_execution_context_without_device_memory(self) -> _Context:
        assert "ExecutionContextAllocationStrategy" in self.without
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch: tuple[int, float] = (0, 0)
        if "set_device_memory" not in engine.without:
            self.set_device_memory = self._set_device_memory

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "device_memory":  # the way before TensorRT 10.1
            assert "set_device_memory" in self._engine.without
            self._scratch = (value, math.inf)
        self.__dict__[name] = value

    def _set_device_memory(self, address: int, size_bytes: int) -> None:
        self._scratch = (address, size_bytes)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = index
        return stream == STREAM

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._profile is None:
            return False
        self._engine.log.append(("shape", self._engine.part, self._profile, name, shape))
        least, _, most = self._engine.ranges[self._profile][name]
        self._shapes[name] = shape
        fits = all(low <= n <= high for low, n, high in zip(least, shape, most, strict=True))
        if not fits:
            self._engine.logger.log(Severity.ERROR, "out of range")
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address != 0

    def execute_async_v3(self, stream: int) -> bool:
        engine, io = self._engine, self._engine.io
        address, size = self._scratch
        whole = {t.name for t in io.inputs} == set(self._shapes)
        whole = whole and {t.name for t in (*io.inputs, *io.outputs)} == set(self._addresses)
        if not whole or self._profile is None or not address or size < engine.scratch_bytes or stream != STREAM:
            return False
        shapes, addresses = dict(self._shapes), dict(self._addresses)  # a graph keeps those of its capture
        capturing = engine.cuda is not None and stream in engine.cuda.capturing
        engine.log.append(
            ("capture" if capturing else "enqueue", engine.part, self._profile, shapes, addresses, address)
        )
        if capturing:
            assert engine.cuda is not None
            engine.cuda.kernel(stream, lambda: self._compute(shapes, addresses))
        else:
            self._compute(shapes, addresses)
        return True

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        io, count = self._engine.io, next(iter(shapes.values()))[0]
        sizes = {"S": count, "T": shapes.get("past_k", (0,))[0], "n": count}
        feeds = {t.name: _array(addresses[t.name], t, shapes[t.name]).copy() for t in io.inputs}
        results = self._engine.session.run([t.name for t in io.outputs], feeds)
        for tensor, result in zip(io.outputs, results, strict=True):
            _array(addresses[tensor.name], tensor, tensor.shape(sizes))[...] = result


def _array(address: int, tensor: TensorIO, shape: tuple[int, ...]) -> np.ndarray:
    dtype = np.dtype(_NUMPY[tensor.dtype])
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype).reshape(shape)
