"""A TensorRT that records what it is asked for and in which order, and computes nothing. `without` leaves features out,
as older and newer releases do.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

from runtime.graph_io import PartIO, TensorIO

Log = list[tuple[Any, ...]]
FLOAT, HALF = "DataType.FLOAT", "DataType.HALF"


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)


class _Logger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = Severity

    def __init__(self) -> None:
        pass


class _Cache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"+"


class _Config:
    """IBuilderConfig."""

    def __init__(self, log: Log, without: Collection[str]) -> None:
        self._log = log
        if "max_aux_streams" not in without:
            self.__dict__["max_aux_streams"] = 7
        if "create_timing_cache" not in without:
            self.__dict__["create_timing_cache"] = lambda data: self._made_cache(data)
        if "set_compute_capability" not in without:
            self.__dict__["set_compute_capability"] = lambda which, at: log.append(("capability", which, at))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("max_aux_streams", "num_compute_capabilities"):
            self._log.append((name, value))
        self.__dict__[name] = value

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self._log.append(("limit", pool, size))

    def set_timing_cache(self, cache: _Cache, ignore_mismatch: bool) -> bool:
        self._log.append(("timing cache", cache.data, ignore_mismatch))
        return True

    def add_optimization_profile(self, profile: _Profile) -> int:
        self._log.append(("profile", dict(profile.shapes)))
        return 0

    def _made_cache(self, data: bytes) -> _Cache:
        return _Cache(data)


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
        self.shapes[name] = (least, best, most)

    def __bool__(self) -> bool:
        return bool(self.shapes)


def fake_module(log: Log, io: PartIO, without: Collection[str] = (), engine: Any = b"engine") -> Any:
    """The module `tensorrt`, whose parser finds `io` in every graph; `engine` is what building gives."""
    enum = {} if "STRONGLY_TYPED" in without else {"STRONGLY_TYPED": 1}
    tensors = [SimpleNamespace(name=t.name, dtype=_dtype(t), shape=_shape(t)) for t in (*io.inputs, *io.outputs)]
    inputs, outputs = tensors[: len(io.inputs)], tensors[len(io.inputs) :]

    def network(flags: int) -> Any:
        log.append(("network", flags))
        return SimpleNamespace(
            num_inputs=len(inputs),
            num_outputs=len(outputs),
            num_layers=3,
            get_input=inputs.__getitem__,
            get_output=outputs.__getitem__,
        )

    def parser(network: Any, logger: Any) -> Any:
        def parse(graph: bytes, path: str) -> bool:
            log.append(("parse", graph, path))
            return bool(graph)

        error = SimpleNamespace(desc=lambda: "In node 3: UNSUPPORTED_NODE")
        return SimpleNamespace(parse=parse, num_errors=1, get_error=lambda i: error)

    def serialise(network: Any, config: Any) -> Any:
        log.append(("build",))
        return engine

    builder = SimpleNamespace(
        create_network=network,
        create_builder_config=lambda: _Config(log, without),
        create_optimization_profile=_Profile,
        build_serialized_network=serialise,
    )
    return SimpleNamespace(
        __version__="10.3.0",
        ILogger=_Logger,
        Builder=lambda logger: builder,
        OnnxParser=parser,
        NetworkDefinitionCreationFlag=SimpleNamespace(**enum),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        ComputeCapability=SimpleNamespace(SM86="sm86"),
        float16=HALF,
        float32=FLOAT,
    )


def _dtype(tensor: TensorIO) -> str:
    return HALF if tensor.dtype == "fp16" else FLOAT


def _shape(tensor: TensorIO) -> tuple[int, ...]:
    return tuple(-1 if isinstance(dim, str) else dim for dim in tensor.dims)


def engine_bytes(number: int) -> bytes:
    """Bytes that are told apart."""
    return struct.pack("<Q", number) * 16
