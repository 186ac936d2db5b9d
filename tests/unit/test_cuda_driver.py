"""The wrapper of cuda-python: which calls it makes with what, what it says when they fail, and that they exist."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from runtime.cuda.driver import Cuda
from runtime.errors import BudgetError, EdgeError, UsageError

OK, OUT_OF_MEMORY, NO_DEVICE = 0, 2, 100


class Runtime:
    """cuda.bindings.runtime: answers (error, value...), counts calls."""

    cudaHostAllocMapped, cudaStreamNonBlocking, cudaEventDisableTiming = 2, 1, 2
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, **answers: Any) -> None:
        properties = SimpleNamespace(
            name=b"Orin\0", major=8, minor=7, multiProcessorCount=8, totalGlobalMem=1 << 33, integrated=1
        )
        self.answers = {
            "cudaGetDeviceCount": (OK, 1),
            "cudaGetDevice": (OK, 0),
            "cudaGetDeviceProperties": (OK, properties),
            "cudaGetErrorString": (OK, b"the reason"),
            **answers,
        }
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return self.answers.get(name, (OK, 55))

        return call


def test_a_gpu_and_what_an_engine_is_tied_to() -> None:
    gpu = Cuda(Runtime()).gpu
    assert (gpu.name, gpu.capability, gpu.integrated) == ("Orin", "87", True)
    assert gpu.identity == "Orin sm_87 x8"


def test_calls_and_their_order() -> None:
    runtime = Runtime(cudaHostAlloc=(OK, 4096), cudaHostGetDevicePointer=(OK, 8192))
    cuda = Cuda(runtime)
    del runtime.calls[:]
    assert cuda.host_alloc(100) == (4096, 8192)
    cuda.copy(1, 2, 3, 9)
    cuda.record(5, 9)
    cuda.stream_wait(8, 5)
    cuda.wait(5)
    cuda.begin_capture(9)
    graph = cuda.end_capture(9)
    cuda.launch(graph, 9)
    assert runtime.calls == [
        ("cudaHostAlloc", 100, 2),
        ("cudaHostGetDevicePointer", 4096, 0),
        ("cudaMemcpyAsync", 1, 2, 3, 4, 9),
        ("cudaEventRecord", 5, 9),
        ("cudaStreamWaitEvent", 8, 5, 0),
        ("cudaEventSynchronize", 5),
        ("cudaStreamBeginCapture", 9, 1),
        ("cudaStreamEndCapture", 9),
        ("cudaGraphInstantiate", 55, 0),
        ("cudaGraphDestroy", 55),
        ("cudaGraphLaunch", 55, 9),
    ]


@pytest.mark.parametrize("answer", [(NO_DEVICE, None), (OK, 0)])
def test_no_gpu_is_one_line_with_the_cure(answer: tuple[int, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        Cuda(Runtime(cudaGetDeviceCount=answer))
    assert str(caught.value).startswith("no NVIDIA GPU can be used (")
    assert "make setup-board" in str(caught.value) and "\n" not in str(caught.value)


def test_no_memory_and_no_way_on() -> None:
    cuda = Cuda(Runtime(cudaHostAlloc=(OUT_OF_MEMORY, None), cudaMalloc=(OUT_OF_MEMORY, None), cudaEventRecord=(999,)))
    for allocate in (cuda.host_alloc, cuda.device_alloc):
        with pytest.raises(BudgetError, match=r"of 500 MB failed \(the reason\): .*--expert-memory"):
            allocate(500_000_000)
    with pytest.raises(EdgeError, match=r"cudaEventRecord failed \(the reason\)"):
        cuda.record(1, 2)


def test_the_real_bindings_have_every_call() -> None:
    """Names and numbers of arguments against cuda-python itself, which can be asked for them without a GPU."""
    from cuda.bindings import runtime

    recorder = Runtime()
    cuda = Cuda(recorder)
    cuda.host_alloc(1)
    cuda.host_free(1)
    cuda.device_free(cuda.device_alloc(1))
    stream, event = cuda.create_stream(), cuda.create_event()
    cuda.copy(1, 2, 0, stream)
    cuda.record(event, stream)
    cuda.wait(event)
    cuda.stream_wait(stream, event)
    cuda.synchronise(stream)
    cuda.begin_capture(stream)
    cuda.destroy_graph(cuda.end_capture(stream))
    cuda.launch(1, stream)
    cuda.destroy_event(event)
    cuda.destroy_stream(stream)
    for name, *arguments in recorder.calls:
        documented = getattr(runtime, name).__doc__.strip().splitlines()[0]
        wanted = [part for part in documented.partition("(")[2].rstrip(")").split(",") if part.strip()]
        assert len(wanted) == len(arguments), documented
    for name in ("cudaHostAllocMapped", "cudaStreamNonBlocking", "cudaEventDisableTiming"):
        assert int(getattr(runtime, name)) == getattr(Runtime, name)
    assert hasattr(runtime.cudaMemcpyKind, "cudaMemcpyDefault")
    assert hasattr(runtime.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")
    properties = runtime.cudaDeviceProp()
    for name in ("name", "major", "minor", "multiProcessorCount", "totalGlobalMem", "integrated"):
        assert hasattr(properties, name)
