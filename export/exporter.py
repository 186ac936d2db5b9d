"""A checkpoint becomes a bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from export.checkpoint import Checkpoint
from export.contents import Bytes, PlannedFile
from export.families import family_of, read_model
from export.filesystem import FileSystem
from export.journal import Identity
from export.plan import Plan
from export.settings import ExportOptions
from export.tokenizer_files import tokenizer_files
from export.writer import BundleWriter, ProgressEvent, check_target
from runtime import __version__
from runtime.config import ModelConfig
from runtime.errors import CheckpointError
from runtime.layout import expert_bytes, padded
from runtime.manifest import FORMAT_VERSION, ExpertLayout, Manifest, Source

GENERATOR = f"remoe-edge {__version__}"
_COMPARE_BYTES = 4 << 20


def export_bundle(
    checkpoint: str | Path,
    out: Path,
    options: ExportOptions | None = None,
    progress: Callable[[ProgressEvent], None] = lambda event: None,
    fs: FileSystem | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Export a checkpoint folder (or hub name) to the bundle directory `out` and return its manifest.

    An export of the same checkpoint that was interrupted is resumed; the bundle is the same byte for byte. Memory: a
    few MiB per worker, whatever the size of the model. `note` is told what is left out on purpose.
    Raises CheckpointError for a checkpoint that is damaged or not supported, UsageError for a target that cannot be,
    EdgeError when a disk fails.
    """
    options = options or ExportOptions()
    check_target(out, options.force)  # before a download or minutes of planning
    with Checkpoint.open(checkpoint) as source, _one_thread_per_tensor():
        plan, config = _plan(source, options)
        for text in plan.notes:
            note(text)
        fingerprint = source.fingerprint()
        name = options.name or (str(checkpoint) if not Path(checkpoint).exists() else source.path.resolve().name)
        identity = Identity(GENERATOR, fingerprint, source.stamp(), _digest(plan.files, name))
        with BundleWriter(out, identity, fs or FileSystem(), force=options.force, workers=options.workers) as writer:
            entries = writer.write(plan.files, progress)
            values = expert_bytes(config)
            manifest = Manifest(
                FORMAT_VERSION,
                GENERATOR,
                Source(name, fingerprint),
                config,
                ExpertLayout("fp16", values, padded(values)),
                options.graphs,
                {path: entries[path] for path in sorted(entries)},
            )
            writer.finish(manifest.to_json())
    return manifest


def _plan(source: Checkpoint, options: ExportOptions) -> tuple[Plan, ModelConfig]:
    config = read_model(source.config, source.generation)
    if config.tied_embeddings:
        _check_tied(source)
    plan = Plan(source, family_of(source.config), config)
    if options.graphs:
        from export.blocks import build_graphs  # needs the onnx package, which the rest of the exporter does not

        for dtype in options.graphs:
            for path, data in build_graphs(config, dtype, plan.locate):
                plan.add(path, data)
    for path, data in tokenizer_files(source.path, source.generation).items():
        plan.add(path, data)
    return plan, config


def _check_tied(source: Checkpoint) -> None:
    """A tied head that is stored nevertheless must equal the embedding. Raises CheckpointError."""
    embed, head = (source.tensors.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if embed is None or head is None:
        return
    same = (embed.dtype, embed.shape) == (head.dtype, head.shape)
    for start in range(0, head.bytes if same else 0, _COMPARE_BYTES):
        size = min(_COMPARE_BYTES, head.bytes - start)
        same = same and bytes(source.read(embed, start, size)) == source.read(head, start, size)
    if not same:
        raise CheckpointError(
            f"{source.path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding: set it to "
            "false in config.json if the checkpoint's own head is meant"
        )


def _digest(files: Sequence[PlannedFile], name: str) -> str:
    digest = hashlib.sha256(name.encode())
    for file in files:
        digest.update(f"\n{file.path} {file.bytes} {file.seed} ".encode())
        if isinstance(file.content, Bytes):
            digest.update(hashlib.sha256(file.content.data).digest())
    return digest.hexdigest()


@contextmanager
def _one_thread_per_tensor() -> Iterator[None]:
    """Workers convert files side by side: threads of torch's own inside each would only get in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
