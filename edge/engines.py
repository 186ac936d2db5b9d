"""`edge engines`: the graphs of a bundle become TensorRT engines for this machine's GPU."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edge import console
from edge.options import argument
from runtime.errors import UsageError

if TYPE_CHECKING:
    from export.engines import PartResult
    from runtime.bundle import Bundle
    from runtime.engine_store import EngineLimits, EngineStore, Target

NAME = "engines"
HELP = "build the TensorRT engines of a bundle, for this machine only"
EXAMPLES = """
edge engines qwen.bundle
edge engines qwen.bundle --context 8192 --prune
edge engines qwen.bundle --check          does everything compile? needs TensorRT-RTX, no GPU
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge engines`."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a bundle with fp16 graphs")
    parser.add_argument("--check", action="store_true",
                        help="build with TensorRT-RTX for sm_86, without a GPU, and keep nothing")  # fmt: skip
    parser.add_argument("--context", metavar="N", type=int,
                        help="tokens that the engines can look back at (default: as for generate)")  # fmt: skip
    parser.add_argument("--workspace", metavar="SIZE", type=argument(console.parse_size),
                        help="memory that TensorRT may compute in (default: 1GiB, or more for many heads)")  # fmt: skip
    parser.add_argument("--prune", action="store_true",
                        help="then remove this model's other engines: of another TensorRT, GPU or option")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Build or check, and print one row per part."""
    from runtime.bundle import Bundle
    from runtime.engine_store import EngineStore

    if args.check and args.prune:
        raise UsageError("--prune removes engines and --check keeps none: give one of them")
    bundle = Bundle.open(args.bundle)
    try:
        options = _options(bundle, args)
        store = EngineStore(bundle.manifest)
        target = _check_target() if args.check else _device_target()
        results = _build(args, bundle, target, options, store)
        removed = _prune(bundle, target, options, store) if args.prune else []
    finally:
        bundle.close()
    if args.json:
        console.print_json(
            {
                "bundle": str(args.bundle),
                "kept": not args.check,
                "target": asdict(target),
                "options": asdict(options),
                "parts": [asdict(result) for result in results],
                "pruned": [str(path) for path in removed],
            }
        )
    else:
        print(format_results(results))
        where = "nothing was kept" if args.check else f"in {store.folder}"
        size = sum(result.engine_bytes for result in results)
        print(f"{len(results)} engines, {console.format_bytes(size)}, {target.flavour} {target.version}, "
              f"{target.gpu}: {where}")  # fmt: skip
    return 0


def format_results(results: list[PartResult]) -> str:
    """The table: one row per part, MB as 10^6 bytes."""
    rows = [["part", "seconds", "engine MB", "weights MB", "peak MB", "layers", ""]]
    for r in results:
        sizes = (f"{size / 1e6:.1f}" for size in (r.engine_bytes, r.weight_bytes, r.peak_bytes))
        rows.append([r.part, f"{r.seconds:.1f}", *sizes, str(r.layers), "from the store" if r.reused else ""])
    return console.format_table(rows)


def _options(bundle: Bundle, args: argparse.Namespace) -> EngineLimits:
    from runtime.engine_store import WORKSPACE_BYTES, EngineLimits
    from runtime.graph_io import BLOCK_TOKENS, attention_scratch_bytes
    from runtime.options import DEFAULT_CONTEXT

    most = bundle.config.max_context
    if args.context is not None and not 1 <= args.context <= most:
        raise UsageError(f"--context {args.context}: this model allows 1 to {most} tokens")
    context = args.context or min(most, DEFAULT_CONTEXT)
    prefill = min(BLOCK_TOKENS, context)
    least = attention_scratch_bytes(bundle.config, context, prefill)
    return EngineLimits(context, prefill, args.workspace or max(WORKSPACE_BYTES, 2 * least))


def _check_target() -> Target:
    from export.engines import CHECK_CAPABILITY
    from runtime.backends.tensorrt_library import load
    from runtime.engine_store import Target

    library = load(("tensorrt-rtx",))
    gpu = f"sm_{CHECK_CAPABILITY}, no GPU needed"
    return Target(library.flavour, library.version, gpu, CHECK_CAPABILITY)


def _device_target() -> Target:
    from runtime.backends.tensorrt_library import load
    from runtime.cuda.driver import Cuda
    from runtime.engine_store import Target

    library = load()
    return Target(library.flavour, library.version, Cuda().gpu.identity)


def _build(
    args: argparse.Namespace, bundle: Bundle, target: Target, options: EngineLimits, store: EngineStore
) -> list[PartResult]:
    from export.engines import build_engines, check_engines, check_memory
    from runtime.engine_store import engine_keys

    largest = check_memory(bundle, options, list(engine_keys(bundle, target, options)))
    console.note(f"building takes up to {console.format_bytes(largest)} of memory, one part at a time")
    with console.Progress(quiet=args.json, unit="parts") as bars:

        def show(result: PartResult, done: int, total: int) -> None:
            bars.update("engines", done, total)

        if args.check:
            return check_engines(bundle, target, options, show)
        return build_engines(bundle, target, options, store, show)


def _prune(bundle: Bundle, target: Target, options: EngineLimits, store: EngineStore) -> list[Path]:
    from runtime.engine_store import engine_keys

    stale = store.others(list(engine_keys(bundle, target, options).values()))
    for path in stale:
        path.unlink()
    if stale:
        console.note(f"removed {len(stale)} files of engines that fit no longer")
    return stale
