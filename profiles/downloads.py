"""One file from a registry that is no Python index (npm, Debian), by address and SHA-256; kept in a folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlparse

from profiles.packages import make_folder, sha256_file
from runtime.errors import EdgeError, UsageError

_TIMEOUT_S = 60
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Download:
    """A file of a registry: where it lies below the registry's address, its name here, SHA-256 and size.

    `registry_variable` is the environment variable that names another registry than `registry`, as the registry's own
    client has it (npm) or as we call it (Debian); `by_hand` is the command that gets the same file.
    """

    registry: str
    registry_variable: str
    path: str
    file: str
    sha256: str
    size_bytes: int
    by_hand: str

    @property
    def url(self) -> str:
        """The full address."""
        return f"{(os.environ.get(self.registry_variable) or self.registry).rstrip('/')}/{self.path}"


def fetch_download(download: Download, folder: Path, opened: Callable[[str], IO[bytes]] | None = None) -> Path:
    """The file in `folder`, downloaded unless it is there already; proxies are taken from the environment.

    Raises UsageError for a file with another hash in the folder or an address that is not http(s), EdgeError when it
    cannot be downloaded or the registry serves something else (nothing is kept then).
    """
    path = folder / download.file
    if path.exists():
        found = sha256_file(path)
        if found != download.sha256:
            raise UsageError(f"{path}: SHA-256 is {found}, expected {download.sha256}: delete it and run this again")
        return path
    make_folder(folder)
    try:
        with (opened or _open)(download.url) as source, tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            partial = Path(file.name)
            try:
                found = _copy(source, file, download.size_bytes)
                if found == download.sha256:
                    file.close()
                    partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:  # urllib's errors and full disks
        raise EdgeError(f"could not download {download.url}: {error}. {_cure(download, folder)}") from None
    if found != download.sha256:
        raise EdgeError(f"{download.url}: not the pinned file ({found}). {_cure(download, folder)}")
    return path


def _open(url: str) -> IO[bytes]:
    if urlparse(url).scheme not in ("http", "https"):
        raise UsageError(f"{url}: a registry's address begins with https://")
    answer: IO[bytes] = urllib.request.urlopen(url, timeout=_TIMEOUT_S)
    return answer


def _copy(source: IO[bytes], file: IO[bytes], size_bytes: int) -> str:
    """Copy at most a byte more than is wanted. Returns the SHA-256, or what was wrong with the size."""
    digest = hashlib.sha256()
    copied = 0
    while block := source.read(min(_BLOCK_BYTES, size_bytes + 1 - copied)):
        digest.update(block)
        file.write(block)
        copied += len(block)
    if copied != size_bytes:
        return f"{'more than ' if copied > size_bytes else ''}{min(copied, size_bytes)} bytes, expected {size_bytes}"
    return digest.hexdigest()


def _cure(download: Download, folder: Path) -> str:
    return (
        f"Check the network (another registry: {download.registry_variable}=https://...), or run `{download.by_hand}` "
        f"and put {download.file} (SHA-256 {download.sha256}, {download.size_bytes / 1e6:.1f} MB) into {folder}"
    )
