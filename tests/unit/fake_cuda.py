"""A CUDA device in this process: streams whose work is done late and in an order that a seed chooses, on real memory.

Work given to a stream waits there. Each call may let a few steps of any stream happen (`eager` of 1: as many as can; 0:
nothing until somebody waits), so a program that forgets to wait sees bytes that are not there yet or no longer there.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from runtime.cuda.driver import Gpu
from runtime.errors import BudgetError

Work = Callable[[], None]
ORIN = Gpu("Orin", "87", 8, 16 << 30, integrated=True)
DISCRETE = Gpu("Fake RTX", "86", 28, 12 << 30, integrated=False)


class FakeCuda:
    """The verbs of runtime.cuda.driver.Cuda. `log` has every call that gives or takes something."""

    def __init__(self, gpu: Gpu = ORIN, seed: int = 0, eager: float = 0.0, memory_bytes: int = 1 << 30) -> None:
        self.gpu = gpu
        self.log: list[tuple[Any, ...]] = []
        self.done: list[Any] = []  # what kernels that were given a name have done, in order
        self.capturing: dict[int, list[Work]] = {}
        self._random, self._eager = random.Random(seed), eager
        self._free = memory_bytes
        self._memory: dict[int, Any] = {}
        self._streams: dict[int, deque[tuple[str, Any]]] = {0: deque()}
        self._promised: dict[int, int] = {}  # event to the last ticket that will make it happen
        self._happened: set[int] = set()
        self._graphs: dict[int, list[Work]] = {}
        self._tickets = 0
        self._handles = 100

    # Memory

    def host_alloc(self, size_bytes: int) -> tuple[int, int]:
        address = self._allocate("cudaHostAlloc", size_bytes)
        return address, address

    def host_free(self, address: int) -> None:
        self.log.append(("host_free", address))
        del self._memory[address]

    def device_alloc(self, size_bytes: int) -> int:
        return self._allocate("cudaMalloc", size_bytes)

    def device_free(self, address: int) -> None:
        self.log.append(("device_free", address))
        del self._memory[address]

    def tensor(self, address: int, values: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_ubyte * (2 * values)).from_address(address), dtype=torch.float16)

    @property
    def allocated(self) -> int:
        """Blocks that have not been given back."""
        return len(self._memory)

    # Streams

    def create_stream(self) -> int:
        return self._handle(lambda handle: self._streams.setdefault(handle, deque()))

    def destroy_stream(self, stream: int) -> None:
        self._drain(stream)
        del self._streams[stream]

    def kernel(self, stream: int, work: Work) -> None:
        """What a launch is: done when the stream comes to it."""
        self._give(stream, "work", work)

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        self.log.append(("copy", target, source, size_bytes, stream))
        self._give(stream, "work", lambda: ctypes.memmove(target, source, size_bytes) and None)

    def synchronise(self, stream: int) -> None:
        self.log.append(("synchronise", stream))
        self._drain(stream)

    # Events

    def create_event(self) -> int:
        return self._handle(lambda handle: None)

    def destroy_event(self, event: int) -> None:
        self._promised.pop(event, None)

    def record(self, event: int, stream: int) -> None:
        self.log.append(("record", event, stream))
        self._tickets += 1
        self._promised[event] = self._tickets
        self._give(stream, "record", self._tickets)

    def wait(self, event: int) -> None:
        self.log.append(("wait", event))
        ticket = self._promised.get(event, 0)
        while ticket and ticket not in self._happened:
            assert self._step_any(), "a deadlock: nothing can go on, and the event has not happened"

    def stream_wait(self, stream: int, event: int) -> None:
        self.log.append(("stream_wait", stream, event))
        if event in self._promised:
            self._give(stream, "wait", self._promised[event])

    # Graphs

    def begin_capture(self, stream: int) -> None:
        self.log.append(("begin_capture", stream))
        self.capturing[stream] = []

    def end_capture(self, stream: int) -> int:
        works = self.capturing.pop(stream)
        self.log.append(("end_capture", stream, len(works)))
        return self._handle(lambda handle: self._graphs.__setitem__(handle, works))

    def launch(self, graph: int, stream: int) -> None:
        self.log.append(("launch", graph, stream))
        for work in self._graphs[graph]:
            self._give(stream, "work", work)

    def destroy_graph(self, graph: int) -> None:
        del self._graphs[graph]

    # How work happens

    def _give(self, stream: int, kind: str, what: Any) -> None:
        if stream in self.capturing:
            assert kind == "work", "an event in a capture"
            self.capturing[stream].append(what)
            return
        self._streams[stream].append((kind, what))
        while self._random.random() < self._eager and self._step_any():
            pass

    def _drain(self, stream: int) -> None:
        while self._streams[stream]:
            assert self._step_any(stream), "a deadlock: the stream waits for an event that nothing brings about"

    def _step_any(self, wanted: int | None = None) -> bool:
        """One step of some stream that can go on, `wanted` before the others."""
        ready = [s for s, queue in self._streams.items() if queue and self._can(queue[0])]
        if not ready:
            return False
        stream = wanted if wanted in ready else self._random.choice(ready)
        kind, what = self._streams[stream].popleft()
        if kind == "record":
            self._happened.add(what)
        elif kind == "work":
            what()
        return True

    def _can(self, entry: tuple[str, Any]) -> bool:
        return entry[0] != "wait" or entry[1] in self._happened

    def _allocate(self, name: str, size_bytes: int) -> int:
        self.log.append((name, size_bytes))
        if size_bytes > self._free:
            raise BudgetError(f"{name} of {size_bytes / 1e6:.0f} MB failed (out of memory)")
        self._free -= size_bytes
        block = (ctypes.c_ubyte * (size_bytes + 4096))()
        address = -(-ctypes.addressof(block) // 4096) * 4096
        self._memory[address] = block
        return address

    def _handle(self, keep: Callable[[int], Any]) -> int:
        self._handles += 1
        keep(self._handles)
        return self._handles
