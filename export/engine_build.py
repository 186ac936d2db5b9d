"""One ONNX graph to one serialised TensorRT engine: strongly typed, with a range of shapes for decoding and one for
prompts. Every call is one that TensorRT 10.3, 10.16, 11 and TensorRT-RTX share, or is asked for first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.backends.tensorrt_library import Library, has, make_logger
from runtime.config import ModelConfig
from runtime.engine_store import EngineLimits
from runtime.errors import EdgeError, UsageError
from runtime.graph_io import PartIO, TensorIO, part_io

DECODE, PREFILL = 0, 1  # the profiles' places in an engine
_OPT_PAST = 1024  # rows of past that kernels are chosen for
_OPT_TOKENS = 128  # tokens of a prompt that kernels are chosen for
Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]  # least, best, most


@dataclass(frozen=True)
class BuildRequest:
    """One engine. `graph_path` is where the graph's external data is looked for; `compute_capability` like "86" names
    a GPU that need not be there, None: the one that is.
    """

    part: str
    graph: bytes
    graph_path: str
    io: PartIO
    ranges: tuple[dict[str, Range], dict[str, Range]]
    workspace_bytes: int
    compute_capability: str | None = None
    timing_cache: bytes = b""


@dataclass(frozen=True)
class BuiltEngine:
    """`engine` has the buffer protocol; `timing_cache` is empty where this TensorRT keeps none."""

    engine: Any
    layers: int
    timing_cache: bytes


def shape_ranges(config: ModelConfig, part: str, options: EngineLimits) -> tuple[dict[str, Range], dict[str, Range]]:
    """The shapes of every input: decoding (S = 1, T = 1 ... context) and prompts (S = 1 ... prefill, the same T)."""
    past, tokens = min(_OPT_PAST, options.context), min(_OPT_TOKENS, options.prefill)
    decode = ({"S": 1, "T": 1}, {"S": 1, "T": past}, {"S": 1, "T": options.context})
    prefill = ({"S": 1, "T": 1}, {"S": tokens, "T": past}, {"S": options.prefill, "T": options.context})

    def ranges(sizes: tuple[dict[str, int], dict[str, int], dict[str, int]]) -> dict[str, Range]:
        least, best, most = ({**size, "n": size["S"]} for size in sizes)
        inputs = part_io(config, part).inputs
        return {tensor.name: (tensor.shape(least), tensor.shape(best), tensor.shape(most)) for tensor in inputs}

    return ranges(decode), ranges(prefill)


def build(library: Library, request: BuildRequest) -> BuiltEngine:
    """Parse, check, set up and build. Raises EdgeError with TensorRT's own words, UsageError for what it cannot do."""
    trt, lines = library.module, list[str]()
    logger = make_logger(library, lines)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    _parse(trt, network, logger, request)
    _check_io(trt, network, request)
    config = builder.create_builder_config()
    cache = _configure(library, config, request)
    for ranges in request.ranges:
        config.add_optimization_profile(_profile(builder, request, ranges))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        words = _last(lines)
        small = "workspace" in words or "OutOfMemory" in words
        cure = ": give more with --workspace, or a smaller --context" if small else ""
        raise EdgeError(f"{request.part}: {library} cannot build this graph: {words}{cure}")
    return BuiltEngine(engine, network.num_layers, _serialised(cache))


def _network_flags(trt: Any) -> int:
    """Strongly typed: fp16 and fp32 exactly where the graph says so. Where the flag is gone, every network is."""
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED) if has(flags, "STRONGLY_TYPED") else 0


def _parse(trt: Any, network: Any, logger: Any, request: BuildRequest) -> None:
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(request.graph, request.graph_path):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise EdgeError(f"{request.part}: TensorRT's parser refuses the graph: {'; '.join(errors[:3]) or 'no reason'}")


def _check_io(trt: Any, network: Any, request: BuildRequest) -> None:
    """The network must have exactly the inputs and outputs that the runtime will bind."""
    found = [_described(trt, network.get_input(i)) for i in range(network.num_inputs)]
    found += [_described(trt, network.get_output(i)) for i in range(network.num_outputs)]
    wanted = [_wanted(tensor) for tensor in (*request.io.inputs, *request.io.outputs)]
    if found != wanted:
        raise EdgeError(f"{request.part}: TensorRT reads {found} from the graph, expected {wanted}")


def _described(trt: Any, tensor: Any) -> tuple[str, str, Shape]:
    dtypes = {trt.float16: "fp16", trt.float32: "fp32"}
    return tensor.name, dtypes.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)


def _wanted(tensor: TensorIO) -> tuple[str, str, Shape]:
    return tensor.name, tensor.dtype, tuple(-1 if isinstance(dim, str) else dim for dim in tensor.dims)


def _configure(library: Library, config: Any, request: BuildRequest) -> Any:
    """Limits, target and timings; returns the timing cache, None where this TensorRT has none."""
    trt = library.module
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if has(config, "max_aux_streams"):
        config.max_aux_streams = 0  # blocks follow each other on one stream and share one scratch memory
    if request.compute_capability is not None:
        _set_target(trt, config, request.compute_capability)
    # TensorRT-RTX has the calls, but they do nothing: it chooses kernels when an engine is loaded.
    if library.flavour == "tensorrt-rtx" or not has(config, "create_timing_cache"):
        return None
    cache = config.create_timing_cache(request.timing_cache)
    return cache if cache is not None and config.set_timing_cache(cache, False) else None


def _set_target(trt: Any, config: Any, capability: str) -> None:
    target = f"SM{capability}"
    if not has(config, "set_compute_capability") or not has(trt.ComputeCapability, target):
        raise UsageError(
            f"this TensorRT cannot build for {target} without such a GPU: use TensorRT-RTX, pip install "
            "'remoe-edge[rtx]'"
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)


def _profile(builder: Any, request: BuildRequest, ranges: dict[str, Range]) -> Any:
    profile = builder.create_optimization_profile()
    try:
        for name, (least, best, most) in ranges.items():
            profile.set_shape(name, least, best, most)
    except ValueError as error:
        raise EdgeError(f"{request.part}: TensorRT refuses the range of {name}: {error}") from None
    if not profile:
        raise EdgeError(f"{request.part}: TensorRT refuses the shape ranges {ranges}")
    return profile


def _serialised(cache: Any) -> bytes:
    return b"" if cache is None else bytes(cache.serialize())


def _last(lines: list[str]) -> str:
    errors = [line for line in lines if "ERROR" in line]
    return (errors or lines or ["no reason given"])[-1][:400]
