"""A GPU as a back-end holds it: torch's view of it, the driver's, and the one stream that computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from runtime.cuda.driver import Cuda
from runtime.errors import UsageError, first_line

_NO_KERNELS = "install the build of torch for this machine's JetPack or CUDA (docs/board-guide.md), or --backend torch"


class Stream(Protocol):
    """A stream that torch and everything else can be made to use."""

    handle: int

    def current(self) -> AbstractContextManager[None]:
        """Inside, torch gives its work to this stream; before and after, the streams wait for each other."""
        ...


class TorchStream:
    """A stream of torch's."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self.handle = int(self._stream.cuda_stream)
        # For this thread at once, and not only inside `current`: whoever calls a decoder's parts by themselves must not
        # compute beside the stream that TensorRT and the copies of the arena are ordered by.
        torch.cuda.set_stream(self._stream)

    @contextmanager
    def current(self) -> Iterator[None]:
        """See Stream.current."""
        around = torch.cuda.current_stream()
        self._stream.wait_stream(around)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            around.wait_stream(self._stream)


@dataclass(frozen=True)
class Device:
    """`torch` is where tensors are made, `cuda` what allocates and orders, `stream` what computes."""

    torch: torch.device
    cuda: Any  # runtime.cuda.driver.Cuda, or what a test puts in its place
    stream: Stream


def open_device() -> Device:
    """The current GPU, after a kernel has run on it. Raises UsageError, in one line with the cure, where none does."""
    cuda, problem = Cuda(), torch_problem()
    if problem:
        raise UsageError(f"torch cannot compute on {cuda.gpu.name}: {problem}: {_NO_KERNELS}")
    return Device(torch.device("cuda"), cuda, TorchStream())


def torch_problem() -> str:
    """Why torch cannot compute on a GPU here, "" where it can. A list of devices proves nothing: a kernel is run."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "this torch was built without CUDA" if built is None else f"torch (CUDA {built}) sees no GPU"
    try:
        values = torch.ones(8, 8, dtype=torch.float16, device="cuda")
        found = float((values @ values).sum().cpu())
    except RuntimeError as error:  # "no kernel image is available" among others
        return first_line(error)
    return "" if found == 512.0 else f"a product is wrong ({found} instead of 512)"
