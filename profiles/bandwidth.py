"""Memory bandwidth as arithmetic sees it: fp16 matrix times vector, a plain sum, a copy.

Every buffer is far larger than a processor's cache and used in turn, so that each call comes from memory.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_ROWS, _COLUMNS = 8192, 4096  # 64 MiB of fp16
_BUFFERS = 8
_Figures = TypeVar("_Figures", bound="DataclassInstance")


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second read by a matrix-vector product and a sum; read and written by a copy."""

    gemv_bytes_per_s: float
    sum_bytes_per_s: float
    copy_bytes_per_s: float

    @property
    def best(self) -> float:
        """The best of them: the ceiling."""
        return max(self.gemv_bytes_per_s, self.sum_bytes_per_s, self.copy_bytes_per_s)


class BandwidthReader:
    """Reads bandwidth as often as it is asked to, with torch's current number of threads; holds 1 GiB of memory."""

    def __init__(self) -> None:
        self._matrices = [torch.full((_ROWS, _COLUMNS), 0.5, dtype=torch.float16) for _ in range(_BUFFERS)]
        self._floats = [m.view(torch.float32) for m in self._matrices]
        self._targets = [f.clone() for f in self._floats]
        self._vector = torch.ones(1, _COLUMNS, dtype=torch.float16)

    @torch.inference_mode()
    def read(self) -> Bandwidth:
        """Once over every buffer with each of them, a tenth of a second or so."""
        size, copies = self._matrices[0].nbytes, list(zip(self._targets, self._floats, strict=True))
        gemv = median_seconds([partial(torch.nn.functional.linear, self._vector, m) for m in self._matrices], 1)
        plain = median_seconds([f.sum for f in self._floats], 1)
        copy = median_seconds([partial(target.copy_, f) for target, f in copies], 1)
        return Bandwidth(size / gemv, size / plain, 2 * size / copy)


def measure_bandwidth(rounds: int = 5) -> Bandwidth:
    """Medians of readings in a row; takes 1 GiB of memory and a second or two."""
    reader = BandwidthReader()
    return field_medians([reader.read() for _ in range(rounds)])


def field_medians(readings: Sequence[_Figures]) -> _Figures:
    """One of them whose every field, a number, is the median of theirs."""
    names = [field.name for field in dataclasses.fields(readings[0])]
    medians = {name: statistics.median(getattr(reading, name) for reading in readings) for name in names}
    return dataclasses.replace(readings[0], **medians)


def median_seconds(calls: Sequence[Callable[[], object]], rounds: int) -> float:
    """Median over `rounds` of the time of all calls in a row, divided by their number; 0 for no calls."""
    if not calls:
        return 0.0
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - begin) / len(calls))
    return statistics.median(times)
