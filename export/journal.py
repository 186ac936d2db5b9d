"""The journal of an export: who made it from what, then one line per file that is complete and on the disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from export.disk import write_whole
from export.filesystem import FileSystem
from runtime.errors import BundleError, UsageError
from runtime.manifest import FileEntry
from runtime.strict import from_dict, parse_json


@dataclass(frozen=True)
class Identity:
    """What an interrupted export must share with the one that resumes it.

    `stamp` are sizes and times of the shards, `plan` a digest of every path, size and small file.
    """

    generator: str
    source: str
    stamp: str
    plan: str


@dataclass(frozen=True)
class _Line:
    path: str
    entry: FileEntry


class Journal:
    """An append-only file; the caller makes sure that lines are written one at a time."""

    def __init__(self, fs: FileSystem, path: Path, identity: Identity) -> None:
        """Open or start the journal. Raises UsageError when it belongs to another export."""
        self._fs = fs
        done = _read(path, identity)
        if done is None and path.exists():
            fs.remove(path)
        self._file = fs.append(path)
        self.done: dict[str, FileEntry] = done or {}
        if done is None:
            try:
                self._append(asdict(identity))
            except OSError:
                fs.close(self._file)
                raise

    def add(self, path: str, entry: FileEntry) -> None:
        """`path` is complete: written, synced and renamed."""
        self._append({"path": path, "entry": asdict(entry)})

    def close(self) -> None:
        """Close the file."""
        self._fs.close(self._file)

    def _append(self, value: dict[str, object]) -> None:
        # The line break in front ends a line that a killed export left unfinished.
        write_whole(self._fs, self._file, memoryview(("\n" + json.dumps(value) + "\n").encode()))


def _read(path: Path, identity: Identity) -> dict[str, FileEntry] | None:
    """Files that the journal lists; None when there is no journal, or one that a kill cut off in its first line."""
    lines = [line for line in path.read_bytes().split(b"\n") if line] if path.exists() else []
    if not lines:
        return None
    try:
        found = from_dict(Identity, parse_json(lines[0], "journal"), "journal")
    except BundleError:
        return None
    for field, name in (("source", "checkpoint"), ("stamp", "checkpoint"), ("generator", "release"), ("plan", "plan")):
        if getattr(found, field) != getattr(identity, field):
            raise UsageError(
                f"{path.parent}: an interrupted export whose {name} differs from this one's (it changed meanwhile): "
                f"it cannot be resumed; remove it with: rm -r '{path.parent}'"
            )
    return _entries(lines[1:])


def _entries(lines: list[bytes]) -> dict[str, FileEntry]:
    done = {}
    for text in lines:
        try:
            line = from_dict(_Line, parse_json(text, "journal"), "journal")
        except BundleError:
            continue  # the last line before a kill: its file is simply written again
        done[line.path] = line.entry
    return done
