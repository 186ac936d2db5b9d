"""One TensorRT engine with its two contexts, for decoding and for prompts: named tensors, one scratch memory for all.

The calls are those that TensorRT 10.3, 10.16, 11 and TensorRT-RTX share; what differs is asked for first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from runtime.backends.tensorrt_library import Library, has, make_logger
from runtime.errors import EdgeError, UsageError
from runtime.graph_io import PartIO, TensorIO

DECODE, PREFILL = 0, 1  # the profiles' places, as export/engine_build.py adds them
ALIGNMENT = 256  # of every address that TensorRT is given
TORCH_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}  # by the names of TensorIO


class Loader:
    """A TensorRT runtime and what it has said. Kept as long as its engines, which need it."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._said: list[str] = []
        self.runtime = library.module.Runtime(make_logger(library, self._said))

    def last_words(self) -> str:
        """TensorRT's last warning or error."""
        return self._said[-1][:300] if self._said else "it gives no reason"


class Part:
    """A deserialised engine, checked against what the graph must have."""

    def __init__(self, loader: Loader, name: str, data: memoryview, io: PartIO, stream: int) -> None:
        """Raises UsageError when the engine cannot be loaded or is not this part's."""
        self._loader, self._name, self._io = loader, name, io
        library, runtime = loader.library, loader.runtime
        self._engine = runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            words = loader.last_words()
            raise UsageError(f"{name}: {library} refuses the engine ({words}): remove it and run `edge engines` again")
        self._check()
        self._scratch = (0, 0)
        self._calls = [self.new_call(profile, stream) for profile in (DECODE, PREFILL)]

    @property
    def scratch_bytes(self) -> int:
        """Memory that a call works in, for the greatest shapes."""
        v2 = "device_memory_size_v2"  # TensorRT 10.1 and later
        return int(self._engine.device_memory_size_v2 if has(self._engine, v2) else self._engine.device_memory_size)

    def use_scratch(self, address: int, size_bytes: int) -> None:
        """Work in this memory, which other parts use, too: never two at the same time."""
        self._scratch = (address, size_bytes)
        for call in self._calls:
            call.use_scratch(address, size_bytes)

    def run(
        self, profile: int, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], stream: int
    ) -> None:
        """Give one call to the stream. All tensors are bound in place. Raises EdgeError when TensorRT refuses it."""
        self._calls[profile].run(inputs, outputs, stream)

    def new_call(self, profile: int, stream: int) -> Call:
        """A call with a context of its own in the same scratch memory, after `use_scratch`."""
        call = Call(self._io, self._context(profile, stream), self._demand)
        if self._scratch[0]:
            call.use_scratch(*self._scratch)
        return call

    def _demand(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise EdgeError(
                f"{self._name}: {self._loader.library} refuses {what} ({self._loader.last_words()}): run `edge engines "
                "BUNDLE` with a context that is large enough, or choose --backend cuda"
            )

    def _context(self, profile: int, stream: int) -> Any:
        """A context without memory of its own, set to one profile for good."""
        trt = self._loader.library.module
        if has(trt, "ExecutionContextAllocationStrategy"):
            context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        else:
            context = self._engine.create_execution_context_without_device_memory()
        if context is None:
            raise EdgeError(
                f"{self._name}: {self._loader.library} makes no execution context ({self._loader.last_words()})"
            )
        self._demand(context.set_optimization_profile_async(profile, stream), f"profile {profile}")
        return context

    def _check(self) -> None:
        trt, engine = self._loader.library.module, self._engine
        kinds = {trt.float16: "fp16", trt.float32: "fp32"}
        found = {}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            found[name] = (is_input, kinds.get(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)))
        wanted = {}
        for is_input, tensors in ((True, self._io.inputs), (False, self._io.outputs)):
            for tensor in tensors:
                dims = tuple(-1 if isinstance(dim, str) else dim for dim in tensor.dims)
                wanted[tensor.name] = (is_input, tensor.dtype, dims)
        if found != wanted or engine.num_optimization_profiles != 2:
            raise UsageError(
                f"{self._name}: the engine has the tensors {found} and {engine.num_optimization_profiles} profiles, "
                f"expected {wanted} and 2: remove it and run `edge engines BUNDLE` again"
            )


class Call:
    """One context: the shapes and addresses that it was given last."""

    def __init__(self, io: PartIO, context: Any, demand: Callable[[bool, str], None]) -> None:
        """`demand` raises for what TensorRT has not accepted."""
        self._io, self._context, self._demand = io, context, demand
        self._shapes: dict[str, tuple[int, ...]] = {}

    def use_scratch(self, address: int, size_bytes: int) -> None:
        """See Part.use_scratch."""
        if has(self._context, "set_device_memory"):  # TensorRT 10.1 and later
            self._context.set_device_memory(address, size_bytes)
        else:
            self._context.device_memory = address

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], stream: int) -> None:
        """See Part.run."""
        for wanted in self._io.inputs:
            tensor = inputs[wanted.name]
            shape = tuple(tensor.shape)
            if self._shapes.get(wanted.name) != shape:  # each change makes TensorRT work out its plan again
                self._demand(self._context.set_input_shape(wanted.name, shape), f"input {wanted.name} of shape {shape}")
                self._shapes[wanted.name] = shape
            self._bind(wanted, tensor)
        for wanted in self._io.outputs:
            self._bind(wanted, outputs[wanted.name])
        self._demand(self._context.execute_async_v3(stream), f"a call with shapes {self._shapes}")

    def _bind(self, wanted: TensorIO, tensor: torch.Tensor) -> None:
        address = tensor.data_ptr()
        assert tensor.is_contiguous() and tensor.dtype == TORCH_DTYPES[wanted.dtype], wanted.name
        assert address % ALIGNMENT == 0, f"{wanted.name} lies at {address:#x}"
        self._demand(self._context.set_tensor_address(wanted.name, address), f"address {address:#x} of {wanted.name}")
