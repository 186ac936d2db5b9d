"""The third stage as a picture: `python -m demo.distill.curve demo/distill/training.jsonl training.png`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

SMOOTHED = 20  # steps per point: a step compares 192 positions of two rows, which differ much


def legs(log: Path) -> list[list[dict[str, Any]]]:
    """Steps of each leg: training that went on counts from 1 again."""
    found: list[list[dict[str, Any]]] = []
    for line in log.read_text(encoding="utf-8").splitlines():
        step = json.loads(line)
        if step["step"] == 1:
            found.append([])
        found[-1].append(step)
    return found


def points(leg: list[dict[str, Any]], before: int) -> tuple[list[float], list[float]]:
    """Thousands of tokens, `before` included, and the mean divergence of SMOOTHED steps each."""
    groups = [leg[i : i + SMOOTHED] for i in range(0, len(leg), SMOOTHED)]
    return [(before + group[-1]["tokens"]) / 1e3 for group in groups], [
        mean(s["kl"] for s in group) for group in groups
    ]


def draw(log: Path, path: Path) -> None:
    """KL(dense || mixture) of the next token on the rows that were trained on, before each step."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.4), constrained_layout=True)
    before = 0
    drawn = legs(log)
    for number, leg in enumerate(drawn, 1):
        axis.plot(*points(leg, before), "o-", markersize=3, label=f"leg {number}")
        before += leg[-1]["tokens"]
    axis.set(xlabel="thousand tokens", ylabel="KL to the dense model, nats", ylim=(0, None))
    if len(drawn) > 1:
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.distill.curve", description="draws the training curve")
    parser.add_argument("log", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)
    draw(options.log, options.out)


if __name__ == "__main__":
    main()
