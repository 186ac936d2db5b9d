"""Processes that tune together, as `torchrun` or `accelerate launch` start them; one alone needs neither.

Each takes its share of every step's sequences. What must be equal everywhere are the gradients of the gates, a few
million values: they are averaged, everything else is frozen and the same in each process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.errors import UsageError


class Workers:
    """This process among its peers: `rank` of `count`, and the device it computes on."""

    def __init__(self, device: str | None = None) -> None:
        """`device` None: this process's GPU where there is one. Raises UsageError when it does not exist."""
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = 0
        self._accelerator: Any = None
        if self.count > 1:
            from accelerate import Accelerator

            self._accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
            self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
            self.device = self._accelerator.device
            return
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError:
            raise UsageError(f"--device {device!r}: expected cpu, cuda or cuda:N") from None
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"--device {device}: this torch finds no GPU: use --device cpu")
        if self.device.type == "cuda" and (self.device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device {device}: this torch finds {torch.cuda.device_count()} GPUs, counted from 0")

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in one message."""
        if self._accelerator is None:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        flat = self._accelerator.reduce(flat, reduction="mean")
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Until every process has come here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the group."""
        if self._accelerator is not None:
            self._accelerator.end_training()
