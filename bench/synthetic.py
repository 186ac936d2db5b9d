"""A random checkpoint of the shape of Qwen1.5-MoE-A2.7B, for speed only.

    python -m bench.synthetic out/synthetic --layers 4      1.2 GB per layer, bf16, one shard per layer

profiles/random_model.py says what is in it; here it is written tensor by tensor, for it can be larger than memory.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.common import GB, MB, conclude, run_main, say
from demo.stream import SafetensorsStream
from profiles.random_model import (
    Shapes,
    SyntheticOptions,
    Windows,
    config_json,
    layer_shapes,
    outer_shapes,
    tensor_values,
)
from runtime.errors import EdgeError, UsageError


def write_synthetic(folder: Path, options: SyntheticOptions) -> int:
    """Write the checkpoint shard by shard; returns its bytes. Raises UsageError when `folder` exists, EdgeError for a
    full disk.
    """
    shards = [layer_shapes(options, layer) for layer in range(options.layers)]
    shards.append(outer_shapes(options))
    total = sum(2 * math.prod(shape) for shard in shards for shape in shard.values())
    if folder.exists():
        raise UsageError(f"{folder} exists: remove it, or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < total * 1.02:
        raise EdgeError(
            f"{folder}: {free / GB:.1f} GB free, the checkpoint takes {total / GB:.1f} GB: use fewer --layers"
        )
    folder.mkdir()
    windows = Windows(options.seed)
    index: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shapes, windows)
        index |= dict.fromkeys(shapes, name)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    _write_json(folder / "config.json", config_json(options))
    return total


def _write_shard(path: Path, shapes: Shapes, windows: Windows) -> None:
    try:
        with SafetensorsStream(path, shapes, "BF16", hashed=False) as stream:
            for name, shape in shapes.items():
                stream.write(name, tensor_values(name, shape, windows))
    except OSError as error:
        raise EdgeError(f"{path}: {error.strerror}") from None


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.synthetic", description="random Qwen1.5-MoE-shaped checkpoint"
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument(
        "--layers", type=int, default=SyntheticOptions.layers, help="1.2 GB each (default: %(default)s)"
    )
    parser.add_argument("--vocab-size", type=int, default=SyntheticOptions.vocab_size, help="default: %(default)s")
    options = parser.parse_args(argv)
    settings = SyntheticOptions(layers=options.layers, vocab_size=options.vocab_size)
    return run_main(lambda: run(options.out, settings))


def run(out: Path, options: SyntheticOptions) -> None:
    """Write and say how fast it went."""
    begin = time.perf_counter()
    total = write_synthetic(out, options)
    seconds = time.perf_counter() - begin
    say(f"{out}: {options.layers} layers, {total / GB:.2f} GB in {seconds:.0f} s ({total / seconds / MB:.0f} MB/s)")
    conclude("synthetic", {"bytes": total, "seconds": seconds, "layers": options.layers})


if __name__ == "__main__":
    sys.exit(main())
