"""Settings of a tuning run."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Literal

from remoe.objective import Objective
from runtime.config import ModelConfig
from runtime.errors import UsageError
from runtime.strict import to_dict


@dataclass(frozen=True)
class TuneOptions:
    """The published ones are defaults: AdamW, lr 5e-5, 200 warm-up steps, clip 1.0, 8 sequences a step, 2,000 steps.

    `batch` sequences make a step, over all processes and micro-batches together. After its warm-up the learning rate
    stays, or falls to 0 along a cosine. `head_share` of the tokens, drawn anew each step, take part in the losses at
    the language model's head, which is much of the work of a small model.
    """

    objective: Objective = field(default_factory=Objective)
    steps: int = 2000
    batch: int = 8
    micro_batch: int = 1
    lr: float = 5e-5
    lr_warmup_steps: int = 200
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.0
    clip: float = 1.0
    head_share: float = 1.0
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int = 50

    def check(self, config: ModelConfig, workers: int = 1) -> None:
        """Raises UsageError naming the setting that cannot be."""
        share = workers * self.micro_batch
        rules = {
            f"steps = {self.steps} is not above 0": self.steps > 0,
            f"micro_batch = {self.micro_batch} is not above 0": self.micro_batch > 0,
            f"batch = {self.batch} is no multiple of {workers} processes x micro_batch {self.micro_batch}": self.batch
            > 0
            and self.micro_batch > 0
            and self.batch % share == 0,
            f"lr = {self.lr} is not a number above 0": 0 < self.lr < math.inf,
            f"lr_warmup_steps = {self.lr_warmup_steps} is below 0": self.lr_warmup_steps >= 0,
            f"schedule {self.schedule!r} is not constant or cosine": self.schedule in ("constant", "cosine"),
            f"weight_decay = {self.weight_decay} is below 0": 0 <= self.weight_decay < math.inf,
            f"clip = {self.clip} is not a number above 0": 0 < self.clip < math.inf,
            f"head_share = {self.head_share} is not above 0 and up to 1": 0 < self.head_share <= 1,
            f"save_every = {self.save_every} is not above 0": self.save_every > 0,
            f"seed = {self.seed} is not from 0 to 2^31": 0 <= self.seed < 1 << 31,
        }
        for problem, holds in rules.items():
            if not holds:
                raise UsageError(f"tuning: {problem}")
        self.objective.check(config.router, len(config.moe_layers))

    def learning_rate(self, step: int) -> float:
        """In the given step, counted from 1."""
        if step <= self.lr_warmup_steps:
            return self.lr * step / self.lr_warmup_steps
        if self.schedule == "constant":
            return self.lr
        rest = max(1, self.steps - self.lr_warmup_steps)
        return self.lr * (1 + math.cos(math.pi * min(1.0, (step - self.lr_warmup_steps - 1) / rest))) / 2

    def digest(self) -> str:
        """SHA-256 of every setting that decides the result."""
        settings = {name: value for name, value in to_dict(self).items() if name != "save_every"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
