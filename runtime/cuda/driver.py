"""The dozen calls of the CUDA runtime that this project makes, each checked, behind one class that tests replace.

cuda-python is imported on first use: `import runtime.cuda.driver` works on a machine without a GPU. Streams and events
are plain integers (handles), addresses too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.errors import BudgetError, EdgeError, UsageError

_CURE = "on a Jetson run: make setup-board; elsewhere install NVIDIA's driver and pip install cuda-bindings"


@dataclass(frozen=True)
class Gpu:
    """One GPU. `integrated`: it shares the machine's memory, as in a Jetson."""

    name: str
    capability: str  # "87" is compute capability 8.7
    multiprocessors: int
    memory_bytes: int
    integrated: bool

    @property
    def identity(self) -> str:
        """What an engine is tied to."""
        return f"{self.name} sm_{self.capability} x{self.multiprocessors}"


class Cuda:
    """The current device. Raises UsageError, in one line with the cure, where there is none that works."""

    def __init__(self, runtime: Any = None) -> None:
        """`runtime` stands for cuda.bindings.runtime."""
        self._runtime = runtime if runtime is not None else _import_runtime()
        error, count = _pair(self._runtime.cudaGetDeviceCount())
        if int(error) != 0 or not count:
            found = self._words(error) if int(error) else "none found"
            raise UsageError(f"no NVIDIA GPU can be used ({found}), which CUDA and TensorRT need: {_CURE}")
        self._device = self._call("cudaGetDevice")
        self.gpu = self._describe()

    def host_alloc(self, size_bytes: int) -> tuple[int, int]:
        """Page-locked memory that the GPU sees, too: its address for the CPU and for the GPU.

        Raises BudgetError when it cannot be had.
        """
        flags = int(self._runtime.cudaHostAllocMapped)
        host = int(self._allocate("cudaHostAlloc", size_bytes, flags))
        return host, int(self._call("cudaHostGetDevicePointer", host, 0))

    def host_free(self, address: int) -> None:
        """Give memory of `host_alloc` back."""
        self._call("cudaFreeHost", address)

    def device_alloc(self, size_bytes: int) -> int:
        """Memory of the GPU. Raises BudgetError when it cannot be had."""
        return int(self._allocate("cudaMalloc", size_bytes))

    def device_free(self, address: int) -> None:
        """Give memory of `device_alloc` back."""
        self._call("cudaFree", address)

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copy in the order of a stream, whatever memory the two addresses lie in."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._call("cudaMemcpyAsync", target, source, size_bytes, kind, stream)

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""
        return int(self._call("cudaStreamCreateWithFlags", int(self._runtime.cudaStreamNonBlocking)))

    def destroy_stream(self, stream: int) -> None:
        """Give a stream of `create_stream` back."""
        self._call("cudaStreamDestroy", stream)

    def create_event(self) -> int:
        """An event without a clock."""
        return int(self._call("cudaEventCreateWithFlags", int(self._runtime.cudaEventDisableTiming)))

    def destroy_event(self, event: int) -> None:
        """Give an event back."""
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """The event happens when everything given to the stream so far is done."""
        self._call("cudaEventRecord", event, stream)

    def wait(self, event: int) -> None:
        """The CPU waits for an event."""
        self._call("cudaEventSynchronize", event)

    def stream_wait(self, stream: int, event: int) -> None:
        """What is given to the stream from now on waits for an event; the CPU does not."""
        self._call("cudaStreamWaitEvent", stream, event, 0)

    def synchronise(self, stream: int) -> None:
        """The CPU waits for all of a stream."""
        self._call("cudaStreamSynchronize", stream)

    def begin_capture(self, stream: int) -> None:
        """What is given to the stream from now on is written down instead of done."""
        self._call(
            "cudaStreamBeginCapture", stream, self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )

    def end_capture(self, stream: int) -> int:
        """What was written down, ready to be launched again and again."""
        graph = self._call("cudaStreamEndCapture", stream)
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        return int(executable)

    def launch(self, graph: int, stream: int) -> None:
        """Do in the stream what `end_capture` returned."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Give a result of `end_capture` back."""
        self._call("cudaGraphExecDestroy", graph)

    def tensor(self, address: int, values: int) -> Any:
        """A torch tensor of `values` fp16 values over memory that the GPU sees; it does not own the memory."""
        import torch

        interface = {"shape": (values,), "typestr": "<f2", "data": (address, False), "version": 3, "strides": None}
        return torch.as_tensor(type("Memory", (), {"__cuda_array_interface__": interface})(), device="cuda")

    def _describe(self) -> Gpu:
        facts = self._call("cudaGetDeviceProperties", self._device)
        name = facts.name.decode(errors="replace") if isinstance(facts.name, bytes) else str(facts.name)
        return Gpu(
            name.strip("\0 "),
            f"{facts.major}{facts.minor}",
            facts.multiProcessorCount,
            facts.totalGlobalMem,
            bool(facts.integrated),
        )

    def _allocate(self, name: str, *arguments: Any) -> Any:
        error, address = _pair(getattr(self._runtime, name)(*arguments))
        if int(error) != 0:
            raise BudgetError(
                f"{name} of {arguments[0] / 1e6:.0f} MB failed ({self._words(error)}): end other programs, or ask for "
                "less with --expert-memory"
            )
        return address

    def _call(self, name: str, *arguments: Any) -> Any:
        error, value = _pair(getattr(self._runtime, name)(*arguments))
        if int(error) != 0:
            raise EdgeError(f"{name} failed ({self._words(error)}): the GPU is in no state to go on; start again")
        return value

    def _words(self, error: Any) -> str:
        _, text = _pair(self._runtime.cudaGetErrorString(error))
        return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def _pair(answer: Any) -> tuple[Any, Any]:
    """cuda-python answers (error,), or (error, value)."""
    return answer[0], answer[1] if len(answer) > 1 else None


def _import_runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise UsageError(f"cuda-python is not installed, without which no GPU can be used: {_CURE}") from None
    return runtime
