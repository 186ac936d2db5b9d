"""Which files a bundle of this checkpoint has, and what each consists of. Nothing is written here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from export.checkpoint import Checkpoint
from export.contents import Bytes, PlannedFile, Tensors
from export.families.base import Family, Rows, Sources
from export.headers import build_header
from runtime.config import ModelConfig
from runtime.errors import CheckpointError
from runtime.layout import (
    BASE_ROUTER,
    EMBED_FILE,
    HEAD_FILE,
    embed_tensors,
    expert_bytes,
    expert_file,
    expert_identity,
    head_tensors,
    layer_file,
    layer_tensors,
    padded,
    router_tensors,
)

Spans = dict[str, tuple[int, int]]


class Plan:
    """The files of one export, largest single files first, so that no long one is left for the end.

    Raises CheckpointError when a tensor is missing, has another shape or dtype, or is one that nobody asked for.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family, config: ModelConfig) -> None:
        self._checkpoint, self._family, self._config = checkpoint, family, config
        self._used: set[str] = set()
        self.notes: list[str] = []  # what the bundle leaves out on purpose
        self._spans: dict[str, Spans] = {}
        self.files = [*self._dense_files(), *self._expert_files()]
        self._refuse_unused()

    def locate(self, file: str, tensor: str) -> tuple[int, int]:
        """Absolute byte offset and length of a tensor in a dense file of the bundle."""
        return self._spans[file][tensor]

    def add(self, path: str, data: bytes) -> None:
        """One more file, small enough for memory."""
        self.files.append(PlannedFile(path, len(data), Bytes(data)))

    def _dense_files(self) -> Iterator[PlannedFile]:
        config, family, names = self._config, self._family, self._checkpoint.tensors
        yield self._safetensors(EMBED_FILE, "F16", embed_tensors(config), family.embed(config))
        yield self._safetensors(HEAD_FILE, "F16", head_tensors(config), family.head(config))
        for layer in range(config.num_layers):
            shapes = layer_tensors(config, layer)
            yield self._safetensors(layer_file(layer), "F16", shapes, family.layer(config, layer))
        routers: Sources = {}
        for layer in config.moe_layers:
            routers |= family.router(config, layer, names)
        yield self._safetensors(BASE_ROUTER, "F32", router_tensors(config), routers)

    def _expert_files(self) -> Iterator[PlannedFile]:
        size = padded(expert_bytes(self._config))
        for layer in self._config.moe_layers:
            for expert in range(self._config.router.num_experts):
                rows = self._family.expert(self._config, layer, expert, self._checkpoint.tensors)
                content = self._tensors("F16", b"", rows)
                yield PlannedFile(expert_file(layer, expert), size, content, expert_identity(layer, expert))

    def _safetensors(self, path: str, dtype: str, shapes: dict[str, tuple[int, ...]], sources: Sources) -> PlannedFile:
        header, self._spans[path] = build_header(dtype, shapes)
        content = self._tensors(dtype, header, [run for name in shapes for run in sources[name]])
        return PlannedFile(path, content.end, content)

    def _tensors(self, dtype: str, header: bytes, rows: Sequence[Rows]) -> Tensors:
        self._used.update(run.name for run in rows)
        return Tensors(self._checkpoint, dtype, header, rows)

    def _refuse_unused(self) -> None:
        expected = {"lm_head.weight"} if self._config.tied_embeddings else set()
        extras = self._family.extras(self._config, self._checkpoint.tensors)
        unused = sorted(
            name
            for name in set(self._checkpoint.tensors) - self._used - expected
            if not name.endswith(self._family.ignored_suffixes) and not name.startswith(tuple(extras))
        )
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            raise CheckpointError(
                f"{self._checkpoint.path}: tensor {unused[0]}{more} has no place in the {self._config.family} "
                "architecture: leaving it out would change the model, so it is not exported"
            )
        self.notes += [
            f"{prefix}*: {what} is left out, the model's own logits do not use it" for prefix, what in extras.items()
        ]
