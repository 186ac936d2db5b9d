"""A bundle on disk: the manifest, and files that are checked whenever they are read."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from runtime.config import ModelConfig
from runtime.errors import BundleError
from runtime.layout import BASE_ROUTER, MANIFEST, expert_file
from runtime.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from runtime.storage import ExpertStorage, read_file


class Bundle:
    """An open bundle; holds one descriptor of its directory, through which every file is reached."""

    def __init__(self, path: Path, directory: int, manifest: Manifest) -> None:
        self.path = path
        self.directory = directory
        self.manifest = manifest
        self.config: ModelConfig = manifest.config

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open and check the manifest. Raises BundleError when there is no bundle or a damaged one."""
        path = Path(path)
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise BundleError(f"{path}: no such bundle: make one with `edge export CHECKPOINT {path}`") from None
        except NotADirectoryError:
            raise BundleError(f"{path}: a bundle is a directory: make one with `edge export CHECKPOINT OUT`") from None
        try:
            return cls(path, directory, parse_manifest(_read_manifest(path, directory)))
        except BaseException:
            os.close(directory)
            raise

    def read(self, name: str) -> memoryview:
        """The bytes of a listed file in page-aligned memory, past the page cache, checked against its xxh3.

        Raises BundleError when it is not listed, missing or changed, ReadError when the disk fails.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: {name} is not in the manifest")
        data = read_file(self.directory, name, entry.bytes)
        found = xxhash.xxh3_64_hexdigest(data)
        if found != entry.xxh3:
            raise BundleError(
                f"{name}: checksum {found}, expected {entry.xxh3}: the bundle is damaged; export it again"
            )
        return data

    def blobs(self) -> dict[tuple[int, int], str]:
        """File name of every expert, by (layer, expert)."""
        experts = range(self.config.router.num_experts)
        return {(layer, e): expert_file(layer, e) for layer in self.config.moe_layers for e in experts}

    def blob_checksums(self) -> dict[tuple[int, int], int]:
        """xxh3-64 of every expert's blob, seeded with its identity."""
        return {key: int(self.manifest.files[name].xxh3, 16) for key, name in self.blobs().items()}

    def open_experts(self, direct: bool) -> ExpertStorage:
        """Open every blob. Raises BundleError when one is missing or has another size."""
        return ExpertStorage(self.directory, self.blobs(), self.manifest.expert.file_bytes, direct)

    def routers(self) -> list[str]:
        """Names of the router files that came with the bundle, "base" first."""
        names = [Path(f).stem for f in self.manifest.files if f.startswith("routers/")]
        return sorted(names, key=lambda name: (name != Path(BASE_ROUTER).stem, name))

    def close(self) -> None:
        """Close the directory."""
        os.close(self.directory)


def _read_manifest(path: Path, directory: int) -> bytes:
    try:
        descriptor = os.open(MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        raise BundleError(
            f"{path}: no {MANIFEST} ({error.strerror}): not a bundle, or an export that did not finish; "
            "run `edge export CHECKPOINT OUT`"
        ) from None
    with open(descriptor, "rb") as file:
        if not os.path.isfile(f"/proc/self/fd/{descriptor}"):
            raise BundleError(f"{path}/{MANIFEST}: not a regular file")
        return file.read(MAX_MANIFEST_BYTES + 1)
