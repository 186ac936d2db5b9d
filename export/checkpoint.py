"""A checkpoint folder: config.json and safetensors shards, checked when opened and read in slices.

Slices are read past the page cache and never mapped: a file that is truncated under us is an error, not a SIGBUS.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from export.headers import TensorInfo, read_header
from export.source import find_source, read_config, read_json
from runtime.errors import CheckpointError, EdgeError
from runtime.layout import PAGE_BYTES, padded

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SAMPLE_BYTES = 1024
_local = threading.local()


class Checkpoint:
    """An open checkpoint; holds the descriptors of its shards.

    `tensors` has every tensor by its name in the checkpoint, `config` and `generation` are config.json and
    generation_config.json ({} where there is none).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        generation = path / "generation_config.json"
        self.generation: dict[str, Any] = read_json(generation) if generation.is_file() else {}
        self.tensors: dict[str, TensorInfo] = {}
        self._headers: dict[str, bytes] = {}
        self._files: dict[str, int] = {}
        self._direct: dict[str, int] = {}  # the same files past the page cache, where the file system can
        try:
            self._open_shards()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, name: str | Path) -> Checkpoint:
        """Open a local folder, or download a hub name first.

        Raises CheckpointError: no such folder, no safetensors, a missing, truncated or damaged shard, a wrong index.
        """
        return cls(find_source(name))

    def read(self, info: TensorInfo, start: int, size_bytes: int) -> memoryview:
        """`size_bytes` of a tensor from its byte `start` on, valid until this thread reads again. Any thread may call.

        Raises EdgeError when the disk fails or the file has become shorter.
        """
        position = info.offset + start
        skipped = position % PAGE_BYTES
        view = _scratch(padded(skipped + size_bytes))
        descriptor, done = self._direct.get(info.file, self._files[info.file]), 0
        while done < skipped + size_bytes:
            try:
                count = os.preadv(descriptor, [view[done:]], position - skipped + done)
            except OSError as error:
                raise EdgeError(f"{self.path / info.file}: reading {info.name}: {error.strerror}") from error
            if count == 0 or os.fstat(descriptor).st_size < position + size_bytes:
                raise EdgeError(f"{self.path / info.file}: became shorter while it was read: leave it alone and retry")
            done += count
        if descriptor == self._files[info.file]:
            # The page cache is charged to our memory group: what was read once is not needed again.
            os.posix_fadvise(descriptor, position, size_bytes, os.POSIX_FADV_DONTNEED)
        return view[skipped : skipped + size_bytes]

    def fingerprint(self) -> str:
        """SHA-256 over config.json, the headers of all shards and the first 1,024 bytes of every tensor.

        Tells two trainings of one model apart without reading every byte.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(self._files):
            digest.update(f"\n{file}\n".encode() + self._headers[file])
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(os.pread(self._files[info.file], min(info.bytes, _SAMPLE_BYTES), info.offset))
        return digest.hexdigest()

    def stamp(self) -> str:
        """Sizes and modification times of the shards: an interrupted export resumes only while they stand still."""
        states = ((file, os.fstat(descriptor)) for file, descriptor in sorted(self._files.items()))
        return ";".join(f"{file}:{s.st_size}:{s.st_mtime_ns}:{s.st_ino}" for file, s in states)

    def close(self) -> None:
        """Close every shard."""
        for descriptors in (self._files, self._direct):
            while descriptors:
                os.close(descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_shards(self) -> None:
        if (self.path / SINGLE).is_file():
            self._add(SINGLE, self._open(SINGLE))
        elif (self.path / INDEX).is_file():
            self._open_indexed(_weight_map(self.path / INDEX))
        else:
            raise CheckpointError(_no_weights(self.path))
        if not self.tensors:
            raise CheckpointError(f"{self.path}: the shards hold no tensor at all")

    def _open_indexed(self, weight_map: dict[str, str]) -> None:
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not (self.path / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(shards)} shards missing: {_some(missing)}: download them"
            )
        for shard in shards:
            self._add(shard, self._open(shard))
        for name, shard in weight_map.items():
            if name not in self.tensors:
                raise CheckpointError(f"{INDEX}: {name} should be in {shard}, but no shard holds it")
            if self.tensors[name].file != shard:
                raise CheckpointError(f"{INDEX}: {name} should be in {shard}, but lies in {self.tensors[name].file}")
        unlisted = sorted(set(self.tensors) - set(weight_map))
        if unlisted:
            where = self.tensors[unlisted[0]].file
            raise CheckpointError(f"{INDEX}: does not list {_some(unlisted)} of {where}: shards and index do not match")

    def _open(self, file: str) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            self._files[file] = os.open(self.path / file, flags)
            os.posix_fadvise(self._files[file], 0, 0, os.POSIX_FADV_RANDOM)  # headers and samples
            self._direct[file] = os.open(self.path / file, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise CheckpointError(f"{self.path / file}: {error.strerror}") from None
            os.posix_fadvise(self._files[file], 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._files[file]

    def _add(self, file: str, descriptor: int) -> None:
        self._headers[file], tensors = read_header(descriptor, file)
        for name, info in tensors.items():
            if name in self.tensors:
                raise CheckpointError(f"tensor {name} is in {self.tensors[name].file} and again in {file}")
            self.tensors[name] = info


def _scratch(size_bytes: int) -> memoryview:
    """This thread's page-aligned buffer, as O_DIRECT wants it."""
    if len(getattr(_local, "scratch", b"")) < size_bytes:
        _local.scratch = memoryview(mmap.mmap(-1, size_bytes))
    return _local.scratch[:size_bytes]


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard == os.path.basename(shard) and shard.endswith(".safetensors")
        if not plain or "\0" in shard:
            raise CheckpointError(f"{path}: {name} lies in {shard!r:.100}, which is no plain .safetensors name")
    return weight_map


def _no_weights(path: Path) -> str:
    pickles = sorted(f.name for f in path.iterdir() if f.suffix in _PICKLES)
    if pickles:
        return (
            f"{path}: only pickled weights ({_some(pickles)}), which can run code when they are read. Get the "
            "safetensors of this model, or convert it where you trust it: model.save_pretrained(DIR)"
        )
    return f"{path}: neither {SINGLE} nor {INDEX}: not a checkpoint, or not downloaded completely"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
