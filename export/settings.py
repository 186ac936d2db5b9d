"""What a user may choose about an export; the command line takes its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportOptions:
    """`graphs`: compute dtypes that get ONNX graphs. `workers`: files converted at once. `force`: replace a bundle that
    is there, when the new one is complete. `name`: how the manifest calls the source; None: the checkpoint's folder.
    """

    graphs: tuple[str, ...] = ("fp16", "fp32")
    workers: int = 16  # more than cores: most of them wait for the disk
    force: bool = False
    name: str | None = None
