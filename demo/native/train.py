"""Trains the native twin: `python -m demo.native.train --out out/native --minutes 20`.

The schedule runs on the clock (or on steps, with --steps): warm-up, then linear to zero, so that whatever a machine
manages in the time is a finished model. The folder holds a checkpoint from the first evaluation on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.data import load
from demo.native.corpus import TEXTS, token_stream, train_tokenizer, windows
from demo.native.model import NativeConfig, NativeModel, load_hub_state
from demo.native.muon import Muon
from demo.native.save import WEIGHTS, save_checkpoint
from runtime.errors import EdgeError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Training:
    """How the twin is trained. One of `minutes` and `steps` is set."""

    minutes: float | None = 20.0
    steps: int | None = None
    batch_tokens: int = 2048  # per step
    length: int = 512  # tokens of the longest window
    short_length: int = 256  # of the windows of the first part: attention costs half, and there are twice as many
    short_share: float = 0.7  # of the training
    matrix_lr: float = 0.02  # Muon
    other_lr: float = 3e-3  # AdamW: embedding, routers, norms, biases
    weight_decay: float = 0.1
    peak: float = 1.0  # factor of the learning rates after the warm-up; less than 1 to go on from a checkpoint
    warm_up_steps: int = 30
    balance: float = 0.02  # weight of the load-balancing loss
    router_z: float = 1e-4
    clip: float = 1.0
    evaluate_every_s: float = 240.0
    validation_windows: int = 32  # of `length` tokens
    seed: int = 0


class Clock:
    """Share of the training that is done, by time or by steps."""

    def __init__(self, training: Training) -> None:
        self._training, self._started = training, time.monotonic()
        self.step = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first step."""
        return time.monotonic() - self._started

    @property
    def share(self) -> float:
        """0 at the beginning, 1 when it is over."""
        if self._training.steps is not None:
            return self.step / self._training.steps
        assert self._training.minutes is not None
        return self.elapsed_s / (60 * self._training.minutes)

    @property
    def length(self) -> int:
        """Tokens of a window now."""
        return self._training.short_length if self.share < self._training.short_share else self._training.length

    @property
    def rate(self) -> float:
        """Factor of the learning rates now."""
        warm = min(1.0, (self.step + 1) / self._training.warm_up_steps)
        return self._training.peak * warm * max(0.0, 1 - self.share)


def optimizers(model: NativeModel, training: Training) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and experts, AdamW for embedding, routers, norms and biases."""
    matrices, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            plain.append(parameter)
        elif name.startswith("embedding") or name.endswith((".gate", "shared_gate.weight")):
            decayed.append(parameter)
        else:
            matrices.append(parameter)
    groups = [{"params": decayed, "weight_decay": training.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=training.other_lr, betas=(0.9, 0.95), fused=True)
    return [Muon(matrices, lr=training.matrix_lr, weight_decay=training.weight_decay), adam]


def loss_of(model: NativeModel, tokens: Tensor, training: Training) -> tuple[Tensor, float]:
    """tokens [B, T + 1] -> (what is minimised, cross-entropy in nats per token)."""
    logits = model(tokens[:, :-1])
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    mixtures = model.mixtures()
    balance = torch.stack([moe.balance for moe in mixtures]).mean()
    router_z = torch.stack([moe.router_z for moe in mixtures]).mean()
    return cross_entropy + training.balance * balance + training.router_z * router_z, cross_entropy.item()


@dataclass(frozen=True)
class Evaluation:
    """On held-out text: nats per token, reuse (EOR: share of a token's experts that the token before chose), and the
    load of the least and the most used expert of any layer as a share of the layer's mean."""

    cross_entropy: float
    reuse: float
    least_load: float
    most_load: float

    @property
    def perplexity(self) -> float:
        """exp of the cross-entropy, per token."""
        return math.exp(self.cross_entropy)


@torch.no_grad()
def evaluate(model: NativeModel, rows: Tensor, batch: int = 8) -> Evaluation:
    """rows [R, T + 1]: every row from its own beginning."""
    total, reuse = 0.0, 0.0
    mixtures = model.mixtures()
    load = torch.zeros(len(mixtures), model.config.experts)
    for part in rows.split(batch):
        part = part.to(model.embedding.weight.device)
        logits = model(part[:, :-1])
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        for index, moe in enumerate(mixtures):
            chosen = moe.chosen.view(len(part), -1, moe.top_k)
            again = (chosen[:, 1:, :, None] == chosen[:, :-1, None, :]).any(-1).float().mean().item()
            reuse += again * len(part) / len(mixtures)
            load[index] += torch.bincount(chosen.flatten(), minlength=model.config.experts).cpu()
    load /= load.mean(1, keepdim=True)
    tokens = rows.shape[0] * (rows.shape[1] - 1)
    return Evaluation(total / tokens, reuse / len(rows), load.min().item(), load.max().item())


def train(
    model: NativeModel, stream: Tensor, held_out: Tensor, training: Training, out: Path, tokenizer: Tokenizer
) -> None:
    """Train and keep the newest checkpoint, the log (training.jsonl) and the settings in `out`."""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(training.seed)
    steppers = optimizers(model, training)
    clock, evaluated_s = Clock(training), 0.0
    with (out / "training.jsonl").open("w", encoding="utf-8") as log:
        while clock.share < 1:
            length = clock.length
            starts = torch.randint(0, len(stream) - length, (training.batch_tokens // length, 1), generator=generator)
            tokens = stream[starts + torch.arange(length + 1)].to(device)
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = clock.rate * group.setdefault("initial_lr", group["lr"])
            loss, cross_entropy = loss_of(model, tokens, training)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            for stepper in steppers:
                stepper.step()
                stepper.zero_grad()
            clock.step += 1
            if clock.elapsed_s - evaluated_s >= training.evaluate_every_s or clock.share >= 1:
                evaluated_s = clock.elapsed_s
                _report(log, clock, training, cross_entropy, evaluate(model, held_out))
                save_checkpoint(model, tokenizer, out)


def _report(log: IO[str], clock: Clock, training: Training, cross_entropy: float, found: Evaluation) -> None:
    row = {
        "step": clock.step,
        "tokens": clock.step * training.batch_tokens,
        "elapsed_s": round(clock.elapsed_s, 1),
        "rate": round(clock.rate, 4),
        "training_cross_entropy": round(cross_entropy, 4),
        "validation_perplexity": round(found.perplexity, 3),
        **{name: round(value, 4) for name, value in asdict(found).items()},
    }
    log.write(json.dumps(row) + "\n")
    log.flush()
    print(json.dumps(row), file=sys.stderr, flush=True)


def run(config: NativeConfig, training: Training, out: Path, download: Path, start: Path | None = None) -> None:
    """Texts, tokenizer, model, training: everything that `out` needs. `start`: go on from this checkpoint's weights.

    Raises UsageError when `out` holds something already or `start` is another model's, EdgeError when the texts cannot
    be fetched.
    """
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty: remove it, or choose another --out")
    documents = load(TEXTS, "train", download)
    tokenizer = train_tokenizer(documents, config.vocab_size)
    stream = token_stream(tokenizer, documents)
    held_out = windows(token_stream(tokenizer, load(TEXTS, "validation", download)), training.length)
    held_out = held_out[: training.validation_windows]
    torch.manual_seed(training.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = NativeModel(config).to(device)
    if start is not None:
        _load(model, start)
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "model": asdict(config),
        "training": asdict(training),
        "start": str(start) if start else None,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_tokens": len(stream),
        "validation_tokens": held_out.shape[0] * training.length,
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts), file=sys.stderr, flush=True)
    train(model, stream, held_out, training, out, tokenizer)


def _load(model: NativeModel, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        load_hub_state(model, load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise UsageError(f"{folder / WEIGHTS}: not a checkpoint of this recipe: {error}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.native.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/native"), help="folder for the checkpoint")
    parser.add_argument("--download", type=Path, default=Path("out/download"), help="folder that keeps the texts")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help=f"length of the training (default: {Training.minutes:g})")
    length.add_argument("--steps", type=int, help="length in steps instead: the same weights again on the same machine")
    parser.add_argument("--start", type=Path, help="go on from the weights in this folder, with a --peak below 1")
    parser.add_argument("--peak", type=float, default=Training.peak, help="factor of the learning rates (default: 1)")
    parser.add_argument("--balance", type=float, default=Training.balance, help="weight of the load-balancing loss")
    options = parser.parse_args(argv)
    minutes = None if options.steps is not None else options.minutes or Training.minutes
    training = Training(minutes=minutes, steps=options.steps, peak=options.peak, balance=options.balance)
    try:
        run(NativeConfig(), training, options.out, options.download, options.start)
    except EdgeError as error:
        print(f"native: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
