"""One engine in a process of its own: what TensorRT allocates is gone when it ends; if it crashes, it crashes alone.

Reads one JSON request on stdin, prints one JSON answer on stdout: {"ok": facts} or {"error": text, "usage": bool}. The
search path comes as arguments, because the process starts isolated from the environment (python -I).
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> int:
    """Build what stdin asks for."""
    from runtime.errors import EdgeError, UsageError

    request = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = {"ok": run(request)}
    except EdgeError as error:
        answer = {"error": str(error), "usage": isinstance(error, UsageError)}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Check graph and weights, build, write the engine to request["out"]. The facts are what the table shows."""
    import time

    from export.engine_build import BuildRequest, build, shape_ranges
    from runtime.backends.tensorrt_library import load
    from runtime.bundle import Bundle
    from runtime.engine_store import EngineLimits
    from runtime.graph_io import part_io

    begin = time.monotonic()
    library = load((request["flavour"],))
    bundle, part, options = Bundle.open(request["bundle"]), request["part"], EngineLimits(**request["options"])
    try:
        graph = checked_graph(bundle, part)
        check_weights(bundle, part)
        ranges, io = shape_ranges(bundle.config, part, options), part_io(bundle.config, part)
        # Through the descriptor: the weights that TensorRT opens lie in the directory whose manifest was checked.
        path = f"/proc/self/fd/{bundle.directory}/dense/{part}.fp16.onnx"
        timing_cache = bytes.fromhex(request["timing_cache"])
        built = build(
            library,
            BuildRequest(
                part, graph, path, io, ranges, options.workspace_bytes, request["compute_capability"], timing_cache
            ),
        )
    finally:
        bundle.close()
    with open(request["out"], "wb") as file:
        file.write(built.engine)
    return {
        "layers": built.layers,
        "seconds": round(time.monotonic() - begin, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "timing_cache": built.timing_cache.hex(),
    }


def peak_rss_bytes() -> int:
    """The most memory that this program has held. Not getrusage: its figure includes the parent's before the exec."""
    from pathlib import Path

    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def checked_graph(bundle: Any, part: str) -> bytes:
    """The graph's bytes after their BLAKE3, before anything parses them. Raises BundleError."""
    from blake3 import blake3

    from runtime.errors import BundleError
    from runtime.layout import graph_file

    file = graph_file(part, "fp16")
    graph = bytes(bundle.read(file))
    if blake3(graph).hexdigest() != bundle.manifest.files[file].blake3:
        raise BundleError(f"{file}: BLAKE3 differs from the manifest: the bundle is damaged; export it again")
    return graph


def check_weights(bundle: Any, part: str) -> None:
    """Every byte of the weights that TensorRT is about to read, against the manifest's BLAKE3. Raises BundleError."""
    import os

    from blake3 import blake3

    from runtime.errors import BundleError
    from runtime.graph_io import weight_files
    from runtime.storage import open_file

    for file in weight_files(bundle.config, part):
        entry = bundle.manifest.files[file]
        descriptor, digest = open_file(bundle.directory, file, entry.bytes), blake3()
        try:
            while chunk := os.read(descriptor, 16 << 20):
                digest.update(chunk)
        finally:
            os.close(descriptor)
        if digest.hexdigest() != entry.blake3:
            raise BundleError(f"{file}: BLAKE3 differs from the manifest: the bundle is damaged; export it again")


if __name__ == "__main__":
    sys.path[:] = sys.argv[1:]
    sys.exit(main())
