"""`edge export`: a Hugging Face checkpoint becomes a bundle."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from edge import console
from export.settings import ExportOptions
from runtime.errors import UsageError

NAME = "export"
HELP = "turn a Hugging Face checkpoint into a bundle"
EXAMPLES = """
edge export ./Qwen1.5-MoE-A2.7B qwen.bundle
edge export allenai/OLMoE-1B-7B-0924 olmoe.bundle
edge export ./new-training qwen.bundle --force
edge export ./Qwen1.5-MoE-A2.7B ./qwen-tuned --hf --router chats.router.safetensors
"""
_GRAPHS = ("fp16", "fp32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge export`."""
    defaults = ExportOptions()
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="folder with config.json and *.safetensors, or org/name"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the bundle's directory; must not exist")
    parser.add_argument(
        "--graphs",
        help="compute dtypes to write ONNX graphs for: fp16, fp32, both with a comma, or none "
        f"(default: {','.join(defaults.graphs)})",
    )
    parser.add_argument("--workers", type=int, help=f"files converted at once (default: {defaults.workers})")
    parser.add_argument("--name", help="how the manifest calls the source (default: its folder)")
    parser.add_argument("--force", action="store_true", help="replace the bundle OUT, once the new one is complete")
    parser.add_argument(
        "--hf",
        action="store_true",
        help="write a Hugging Face checkpoint with the gates of --router instead of a bundle",
    )
    parser.add_argument("--router", metavar="FILE", type=Path, help="the tuned gates of --hf (edge tune)")
    parser.add_argument(
        "--gate-dtype",
        choices=["fp32", "same"],
        help="of the gates of --hf: fp32, or the same as in CHECKPOINT, which rounds them (default: fp32)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Export and say what became of it."""
    from export.exporter import export_bundle
    from export.writer import ProgressEvent

    if args.hf:
        return _run_hf(args)
    if args.router is not None:
        raise UsageError("--router goes with --hf: a bundle takes routers when it runs, edge generate --router FILE")
    if args.gate_dtype is not None:
        raise UsageError("--gate-dtype goes with --hf: the gates of a bundle are always fp32")
    options = _options(args)
    started, reused = time.monotonic(), 0
    with console.Progress(quiet=args.json) as bars:

        def show(event: ProgressEvent) -> None:
            nonlocal reused
            reused = event.reused_bytes
            bars.update("export", event.done_bytes, event.total_bytes)

        # Absolute: the staging directory lies beside OUT, whatever way its name was written.
        manifest = export_bundle(args.checkpoint, Path(args.out).absolute(), options, show, note=console.note)
    seconds = time.monotonic() - started
    size = sum(entry.bytes for entry in manifest.files.values())
    if reused:
        console.note(f"resumed an interrupted export: {console.format_bytes(reused)} were already there")
    if not any(name.startswith("tokenizer/") for name in manifest.files):
        console.note("the checkpoint has no tokenizer.json: this bundle works on token ids (--prompt-ids)")
    result = {
        "bundle": str(args.out),
        "files": len(manifest.files) + 1,
        "bytes": size,
        "reused_bytes": reused,
        "seconds": round(seconds, 3),
        "bytes_per_s": round((size - reused) / seconds),
        "fingerprint": manifest.source.fingerprint,
    }
    if args.json:
        console.print_json(result)
    else:
        rate = f"{console.format_bytes((size - reused) / seconds)}/s"
        print(f"{args.out}: {result['files']} files, {console.format_bytes(size)}, {seconds:.1f} s, {rate}")
    return 0


def _options(args: argparse.Namespace) -> ExportOptions:
    """Of a bundle. Raises UsageError."""
    defaults = ExportOptions()
    workers = defaults.workers if args.workers is None else args.workers
    if not 1 <= workers <= 64:
        raise UsageError(f"--workers {workers}: expected 1 to 64")
    graphs = defaults.graphs if args.graphs is None else _graphs(args.graphs)
    return ExportOptions(graphs, workers, args.force, args.name)


def _run_hf(args: argparse.Namespace) -> int:
    """A checkpoint with tuned gates."""
    from export.hf import GateDtype, export_hf

    if args.router is None:
        raise UsageError("--hf needs --router FILE, the tuned gates (edge tune)")
    if args.force:
        raise UsageError("--hf replaces no folder, not even with --force: remove it yourself")
    for name in ("graphs", "workers", "name"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} is for bundles, but --hf writes a checkpoint: leave one of them out")
    gate_dtype: GateDtype = args.gate_dtype or "fp32"
    with console.Progress(quiet=args.json) as bars:
        done = export_hf(
            args.checkpoint,
            Path(args.out).absolute(),
            args.router,
            gate_dtype,
            lambda done, total: bars.update("copy", done, total),
        )
    if done.left_out:
        console.note(f"left out, as their gates are not tuned: {', '.join(done.left_out)}")
    if done.rounded:
        who = f"rounded to {done.narrow_dtype}" if gate_dtype == "same" else f"loaded as {done.narrow_dtype}"
        console.note(f"gates {who} choose otherwise in {100 * done.rounded:.2f} % of the choices for random inputs")
    result = {"checkpoint": str(args.out), "gate_dtype": gate_dtype, **dataclasses.asdict(done)}
    if args.json:
        console.print_json(result)
    else:
        print(f"{args.out}: {done.files} files, {console.format_bytes(done.bytes)}, {done.gates} gates tuned")
    return 0


def _graphs(text: str) -> tuple[str, ...]:
    wanted = [] if text == "none" else text.split(",")
    unknown = [name for name in wanted if name not in _GRAPHS]
    if unknown:
        raise UsageError(f"--graphs {unknown[0]!r} is not one of {', '.join(_GRAPHS)}, none")
    return tuple(name for name in _GRAPHS if name in wanted)
