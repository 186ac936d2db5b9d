"""Checks a bundle against its manifest and the layout: quickly by names, sizes and headers, or fully by every hash."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from export.disk import Hashes
from runtime.bundle import Bundle
from runtime.config import ModelConfig
from runtime.errors import EdgeError
from runtime.layout import (
    BASE_ROUTER,
    EMBED_FILE,
    HEAD_FILE,
    MANIFEST,
    PAGE_BYTES,
    embed_tensors,
    expert_file,
    expert_identity,
    graph_file,
    head_tensors,
    layer_file,
    layer_tensors,
    router_tensors,
)
from runtime.storage import DirectUnsupportedError, open_file

_CHUNK_BYTES = 4 << 20
_HEADER_BYTES = 8 + (1 << 20)
_WORKERS = 4


@dataclass(frozen=True)
class Report:
    """What was checked and what is wrong; `problems` name their file."""

    files: int
    bytes: int
    full: bool
    problems: tuple[str, ...]


def verify_bundle(
    path: str | Path, *, full: bool = True, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Check a bundle; `progress` gets bytes hashed and all bytes.

    Raises BundleError when there is no bundle or its manifest is no good; everything else becomes a problem.
    """
    bundle = Bundle.open(path)
    try:
        problems = [*_unlisted(bundle), *_missing_graphs(bundle)]
        checked = {**_each(bundle, _open_and_close), **_headers(bundle)}
        problems += checked.values()
        if full:
            problems += _hashes(bundle, set(checked), progress)
        entries = bundle.manifest.files
        return Report(len(entries), sum(e.bytes for e in entries.values()), full, tuple(problems))
    finally:
        bundle.close()


def _each(bundle: Bundle, check: Callable[[Bundle, str], object]) -> dict[str, str]:
    """Problems by file."""
    problems = {}
    for name in bundle.manifest.files:
        try:
            check(bundle, name)
        except EdgeError as error:
            problems[name] = str(error)
    return problems


def _open_and_close(bundle: Bundle, name: str) -> None:
    os.close(open_file(bundle.directory, name, bundle.manifest.files[name].bytes))


def _unlisted(bundle: Bundle) -> Iterator[str]:
    files = {*bundle.manifest.files, MANIFEST}
    known = files | {str(parent) for name in files for parent in Path(name).parents}
    for folder, subfolders, names in os.walk(bundle.path):
        for name in sorted(subfolders + names):
            path = os.path.relpath(os.path.join(folder, name), bundle.path)
            if path not in known:  # a known name that is no file, or no folder, is found when it is opened
                yield f"{path}: not listed in {MANIFEST}: it does not belong to the bundle, remove it"


def _missing_graphs(bundle: Bundle) -> Iterator[str]:
    config = bundle.config
    parts = ["head", "expert"]
    for layer in range(config.num_layers):
        parts += [f"layer_{layer:02d}"] + ([f"mlp_{layer:02d}"] if config.mlp_size(layer) else [])
    for dtype in bundle.manifest.graphs:
        for name in (graph_file(part, dtype) for part in parts):
            if name not in bundle.manifest.files:
                yield f"{name}: {MANIFEST} promises {dtype} graphs, but does not list it: export again"


def _headers(bundle: Bundle) -> dict[str, str]:
    problems = {}
    for name, (dtype, shapes) in _tensor_files(bundle.config, bundle.routers()).items():
        try:
            problem = _header_problem(bundle, name, dtype, shapes)
        except EdgeError as error:
            problem = str(error)
        if problem:
            problems[name] = problem
    return problems


def _tensor_files(config: ModelConfig, routers: list[str]) -> dict[str, tuple[str, dict[str, tuple[int, ...]]]]:
    """dtype and shapes of every safetensors file."""
    files = {EMBED_FILE: ("F16", embed_tensors(config)), HEAD_FILE: ("F16", head_tensors(config))}
    for layer in range(config.num_layers):
        files[layer_file(layer)] = ("F16", layer_tensors(config, layer))
    folder = Path(BASE_ROUTER).parent
    for router in routers:
        files[f"{folder}/{router}.safetensors"] = ("F32", router_tensors(config))
    return files


def _header_problem(bundle: Bundle, name: str, dtype: str, shapes: dict[str, tuple[int, ...]]) -> str | None:
    from runtime.dense import check_entry, parse_header  # imports torch

    size = bundle.manifest.files[name].bytes
    descriptor = open_file(bundle.directory, name, size)
    try:
        start, header = parse_header(memoryview(os.pread(descriptor, min(size, _HEADER_BYTES), 0)), name)
    finally:
        os.close(descriptor)
    if list(header) != list(shapes):
        return f"{name}: holds the tensors {list(header)}, expected {list(shapes)}"
    if start % PAGE_BYTES:
        return f"{name}: its data starts at byte {start}, not on a page of {PAGE_BYTES}"
    end = 0
    for tensor, shape in shapes.items():
        _, begin, stop = check_entry(header[tensor], f"{name}: {tensor}", shape, size - start)
        if header[tensor]["dtype"] != dtype:
            return f"{name}: {tensor} has dtype {header[tensor]['dtype']}, expected {dtype}"
        if begin != end:
            return f"{name}: {tensor} starts at byte {begin} of the data, expected {end}"
        end = stop
    return f"{name}: {size - start - end} bytes after the last tensor" if start + end != size else None


def _hashes(bundle: Bundle, skip: set[str], progress: Callable[[int, int], None]) -> list[str]:
    config, files = bundle.config, bundle.manifest.files
    seeds = {
        expert_file(n, e): expert_identity(n, e) for n in config.moe_layers for e in range(config.router.num_experts)
    }
    names = [name for name in files if name not in skip]
    total, done, problems = sum(files[name].bytes for name in names), 0, []
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="verify") as pool:
        for name, problem in zip(
            names, pool.map(lambda n: _hash_problem(bundle, n, seeds.get(n, 0)), names), strict=True
        ):
            done += files[name].bytes
            progress(done, total)
            problems += [problem] if problem else []
    return problems


def _hash_problem(bundle: Bundle, name: str, seed: int) -> str | None:
    entry = bundle.manifest.files[name]
    hashes = Hashes(seed)
    try:
        for part in _read(bundle.directory, name, entry.bytes):
            hashes.update(part)
    except EdgeError as error:
        return str(error)
    except OSError as error:
        return f"{name}: {error.strerror}: the disk cannot read it"
    found = hashes.entry(entry.bytes)
    wrong = [kind for kind in ("blake3", "xxh3") if getattr(found, kind) != getattr(entry, kind)]
    return f"{name}: its {' and '.join(wrong)} differ from {MANIFEST}: damaged, export again" if wrong else None


def _read(directory: int, name: str, size: int) -> Iterator[memoryview]:
    """The bytes of a file, past the page cache where possible: what counts is what the disk holds."""
    try:
        descriptor = open_file(directory, name, size, direct=True)
    except DirectUnsupportedError:
        descriptor = open_file(directory, name, size)
    buffer = memoryview(mmap.mmap(-1, _CHUNK_BYTES))
    try:
        done = 0
        while done < size:
            count = os.preadv(descriptor, [buffer], done)
            if count == 0:
                raise EdgeError(f"{name}: ended after {done} of {size} bytes")
            yield buffer[:count]
            done += count
    finally:
        os.close(descriptor)
