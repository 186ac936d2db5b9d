"""The training curve as a picture: `python -m demo.native.curve demo/native/training.jsonl training.png`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_log(path: Path) -> dict[str, list[Any]]:
    """Columns of training.jsonl."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: [row[name] for row in rows] for name in rows[0]}


def draw(log: dict[str, list[Any]], path: Path) -> None:
    """Perplexity on training batches and on validation text, and the range of the load, over tokens: one PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    figure, (quality, load) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    tokens = [count / 1e6 for count in log["tokens"]]
    quality.plot(
        tokens, [math.exp(value) for value in log["training_cross_entropy"]], color="C7", label="training batch"
    )
    quality.plot(tokens, log["validation_perplexity"], "o-", color="C0", markersize=3, label="validation")
    quality.set(xlabel="million tokens", ylabel="perplexity", yscale="log")
    quality.yaxis.set_major_formatter(ScalarFormatter())
    quality.yaxis.set_minor_formatter(ScalarFormatter())
    quality.legend()
    load.fill_between(tokens, log["least_load"], log["most_load"], alpha=0.3, label="load, least to most used / mean")
    load.plot(tokens, log["reuse"], "o-", color="C3", markersize=3, label="EOR")
    load.set(xlabel="million tokens", ylim=(0, None))
    load.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.native.curve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log", type=Path, help="training.jsonl of demo.native.train")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    options = parser.parse_args(argv)
    draw(read_log(options.log), options.picture)


if __name__ == "__main__":
    main()
