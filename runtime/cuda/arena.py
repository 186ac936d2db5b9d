"""The arena of a GPU: page-locked chunks that the disk fills and the GPU reads, and events that keep the two apart.

    integrated (a Jetson)   one memory: the GPU reads a slot where the NVMe put it
    discrete                a page-locked slot for the disk and a slot of GPU memory for each expert; an asynchronous
                            copy from one to the other when the bytes have landed

The CPU runs ahead of the GPU: when the cache gives a slot to another expert, kernels that read the old one may not have
begun. `used` marks the place in the compute stream after them, `begin_write` waits for it.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

from runtime.cuda.driver import Cuda
from runtime.errors import BudgetError

CHUNK_BYTES = 256 << 20  # L4T 36.4.7 and later refuse large blocks with much memory free


class CudaArena:
    """`slots` slots of `slot_bytes` each (whole pages). The same face as runtime.arena.Arena."""

    def __init__(self, cuda: Cuda, stream: int, slots: int, slot_bytes: int, value_bytes: int) -> None:
        """`stream` is the one that computes. Raises BudgetError when the memory cannot be had; none is kept then."""
        self._cuda, self._stream = cuda, stream
        self._slot_bytes = slot_bytes
        self.size_bytes = slots * slot_bytes
        self.slots = slots
        self.views: list[memoryview] = []
        self.tensors: list[Any] = []
        self._owned = contextlib.ExitStack()
        self._host: list[int] = []
        self._device: list[int] = []
        self._used: dict[int, int] = {}  # slot to the event after the last kernel that read it
        self._copied: dict[int, int] = {}
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            self._copies = 0 if cuda.gpu.integrated else self._own(cuda.create_stream(), cuda.destroy_stream)
            per_chunk = max(1, CHUNK_BYTES // slot_bytes)
            for first in range(0, slots, per_chunk):
                self._add_chunk(min(per_chunk, slots - first))
            self.tensors += [cuda.tensor(address, value_bytes // 2) for address in self._device]
            on_error.pop_all()

    def begin_write(self, slot: int) -> None:
        """Wait until nothing reads the bytes that a new expert will overwrite."""
        waited = self._used if self._cuda.gpu.integrated else self._copied
        if slot in waited:
            self._cuda.wait(waited[slot])

    def landed(self, slot: int) -> None:
        """A slot's bytes are there and right: make them visible to what the GPU is asked for from now on."""
        if self._cuda.gpu.integrated:
            return
        if slot in self._used:  # kernels that read the slot's last expert
            self._cuda.stream_wait(self._copies, self._used[slot])
        self._cuda.copy(self._device[slot], self._host[slot], self._slot_bytes, self._copies)
        event = self._event(self._copied, slot)
        self._cuda.record(event, self._copies)
        self._cuda.stream_wait(self._stream, event)

    def used(self, slot: int) -> None:
        """Everything that reads the slot for this step has been given to the compute stream."""
        self._cuda.record(self._event(self._used, slot), self._stream)

    def close(self) -> None:
        """Give the memory back, after the last kernel. Safe to call twice."""
        if self.views:
            self._cuda.synchronise(self._stream)
        self.tensors.clear()
        self.views.clear()
        self._owned.close()

    def _add_chunk(self, slots: int) -> None:
        size = slots * self._slot_bytes
        try:
            host, device = self._cuda.host_alloc(size)
            self._owned.callback(self._cuda.host_free, host)
            if not self._cuda.gpu.integrated:
                device = self._own(self._cuda.device_alloc(size), self._cuda.device_free)
        except BudgetError as error:
            done = len(self.views) * self._slot_bytes / 1e6
            raise BudgetError(
                f"{error}; {done:.0f} of {self.size_bytes / 1e6:.0f} MB of expert slots were there by then"
            ) from None
        whole = memoryview((ctypes.c_ubyte * size).from_address(host)).cast("B")
        for start in range(0, size, self._slot_bytes):
            self.views.append(whole[start : start + self._slot_bytes])
            self._host.append(host + start)
            self._device.append(device + start)

    def _event(self, events: dict[int, int], slot: int) -> int:
        if slot not in events:
            events[slot] = self._own(self._cuda.create_event(), self._cuda.destroy_event)
        return events[slot]

    def _own(self, handle: int, give_back: Any) -> int:
        self._owned.callback(give_back, handle)
        return handle
