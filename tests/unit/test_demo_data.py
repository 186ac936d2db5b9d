"""Texts by name: splits that never meet, pinned hashes, and readers of packages built here with the same layout."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from demo import data
from demo.bible import chapters
from demo.data import SETS, SPLITS, load, split_of
from profiles.downloads import Download, fetch_download
from profiles.packages import Package, sha256_file
from runtime.errors import EdgeError, UsageError

CHATS = [
    {"id": "a_0", "conversations": [{"from": "human", "value": "Hello "}, {"from": "gpt", "value": "Hi."}]},
    {"id": "b_0", "conversations": [{"from": "human", "value": "Grüße, schöne Wörter"}]},
    {"id": "c_0", "conversations": []},
    {"id": "cut", "conversations": [{"from": "human", "value": "this record is cut off"}]},
]


def tar_bytes(files: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def zip_bytes(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def lzw(text: bytes, clear_at: int | None = None) -> bytes:
    """`compress` without its magic, straight from its description: groups of 8 codes, 9 bits and more, 256 clears."""
    table = {bytes([value]): value for value in range(256)}
    next_code, bits, group, out, word, at = 257, 9, [], b"", b"", 0

    def flush(codes: list[int]) -> bytes:
        whole = sum(code << (bits * index) for index, code in enumerate(codes))
        return whole.to_bytes(bits, "little") if codes else b""  # 8 codes of n bits are n bytes

    while at < len(text):
        word = text[at : at + 1]
        while at + len(word) < len(text) and word + text[at + len(word) : at + len(word) + 1] in table:
            word += text[at + len(word) : at + len(word) + 1]
        group.append(table[word])
        at += len(word)
        if len(group) == 8:
            out, group = out + flush(group), []
        following = text[at : at + 1]
        if following:
            table[word + following] = next_code
            next_code += 1
            # the reader is one entry behind: it widens when its own table is full
            if next_code - 1 == 1 << bits:
                out, group, bits = out + flush(group), [], bits + 1
        if clear_at is not None and at >= clear_at:
            group.append(256)
            out, group, bits, next_code, clear_at = out + flush(group), [], 9, 257, None
            table = {bytes([value]): value for value in range(256)}
    return out + flush(group)[: -(-len(group) * bits // 8)]


def bible_deb(text: bytes, window: int = 4096) -> bytes:
    parts = [text[at : at + window] for at in range(0, len(text), window)]
    codes = [lzw(part, clear_at=2000 if index == 0 else None) for index, part in enumerate(parts)]
    start = 0x50 + 12 + 4 * (len(codes) + 1)
    offsets = [start]
    for code in codes:
        offsets.append(offsets[-1] + len(code))
    header = b"EC02Compressed Data File".ljust(0x50, b"\0")
    header += struct.pack(f">{3 + len(offsets)}I", 0, window, len(codes), *offsets)
    packed = lzma.compress(tar_bytes({"./usr/lib/bible.data": header + b"".join(codes)}, "w"))
    out = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", packed)):
        out += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    return out


VERSES = [
    f"Ge{chapter}:{verse} Verse {verse} of {chapter}, and it was good, {'very ' * (verse % 7)}good."
    for chapter in range(1, 6)
    for verse in range(1, 60)
]
FILES = {
    "chats": zip_bytes({data.FETCHED["sharegpt"].member: json.dumps(CHATS, indent=2).encode()[:-40]}),
    "gsm8k": zip_bytes({data.FETCHED["gsm8k"].member: b'{"id": "g", "prompt": "2 + 2?", "upstream_answer": "4"}\n'}),
    "humaneval": zip_bytes(
        {
            data.FETCHED["humaneval"].member: gzip.compress(
                b'{"task_id": "H/0", "prompt": "def f():\\n", "canonical_solution": "    return 1\\n"}\n'
            )
        }
    ),
    "prose": tar_bytes(
        {
            "package/sotu/data/1790_a_b_n.json": b'{"text": "Fellow citizens"}',
            "package/sotu/data/meta.json": b'[{"year": 1790}]',
            "package/moby-dick/data/chapter_1.json": b'"Call me Ishmael."',
            "package/moby-dick/data/chapter_1.txt": b"Call me Ishmael.",
            "package/cmudict/data/dict.json": b'"no prose"',
        }
    ),
    "docs": tar_bytes({"d-1/docs/a.txt": b"Manual", "d-1/docs/releases/1.txt": b"Notes", "d-1/README.txt": b"No"}),
    "code": tar_bytes(
        {"package/python_stdlib.zip": zip_bytes({"a.py": b"x = 1\n", "encodings/b.py": b"y\n", "c.txt": b"z"})}
    ),
    "bible": bible_deb("\n".join(["A title", *VERSES, ""]).encode()),
}
EXPECTED = {
    "chats": {"<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"},
    "gsm8k": {"<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"},
    "humaneval": {"def f():\n    return 1\n"},
    "prose": {"Fellow citizens", "Call me Ishmael."},
    "docs": {"Manual"},
    "code": {"x = 1\n"},
    "bible": {
        "\n".join(line.split(" ", 1)[1] for line in VERSES if line.startswith(f"Ge{chapter}:"))
        for chapter in range(1, 6)
    },
}


@pytest.mark.parametrize("name", SETS)
def test_every_document_is_in_one_split(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = SETS[name]
    file = tmp_path / (chosen.source.wheel if isinstance(chosen.source, Package) else chosen.source.file)
    file.write_bytes(FILES[name])
    source = dataclasses.replace(chosen.source, sha256=sha256_file(file))
    monkeypatch.setitem(SETS, name, dataclasses.replace(chosen, source=source))
    found = [text for split in chosen.splits for text in load(name, split, tmp_path)]
    assert set(found) == EXPECTED[name] and len(found) == len(EXPECTED[name])
    with pytest.raises(UsageError, match="has no split 'dev'"):
        load(name, "dev", tmp_path)


def test_splits_by_hash() -> None:
    keys = [f"chapter {number}" for number in range(4000)]
    places = [split_of("bible", key) for key in keys]
    assert all(0.03 < places.count(split) / 4000 < 0.07 for split in SPLITS[1:])
    # `printf bible/Ge1 | sha256sum` begins with e000811c, 3758129436, which is 16 modulo 20
    assert split_of("bible", "Ge1") == "train"
    chats = {split_of("chats", f"{number}_0") for number in range(100)}
    assert chats == {"validation", "test"}
    assert all(split_of("chats", f"{n}_0") == split_of("chats", f"{n}_1") for n in range(100))  # pieces of one chat


@pytest.mark.parametrize("name", ["chats", "gsm8k", "humaneval"])
def test_nothing_for_evaluation_can_be_trained_on(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} has no split 'train'"):
        load(name, "train", Path("unused"))


def test_unknown_texts_name_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no texts are called 'poems'.*bible"):
        load("poems", "train", Path("unused"))


WANTED = b"the wanted file"
FILE = Download("https://a.test", "TEST_REGISTRY", "x/y.tgz", "y.tgz", "", len(WANTED), "fetch y")


@pytest.fixture
def download(tmp_path: Path) -> Download:
    probe = tmp_path / "probe"
    probe.write_bytes(WANTED)
    return dataclasses.replace(FILE, sha256=sha256_file(probe))


def test_download_is_kept_and_asked_for_once(
    download: Download, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def opened(url: str) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(WANTED)

    folder = tmp_path / "kept"
    monkeypatch.setenv("TEST_REGISTRY", "https://mirror.test/npm/")
    for _ in range(2):
        assert fetch_download(download, folder, opened).read_bytes() == WANTED
    assert asked == ["https://mirror.test/npm/x/y.tgz"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"another file!!!", "not the pinned file"),
        (WANTED[:-1], "14 bytes, expected 15"),
        (WANTED + b"tail" * 1000, "more than 15 bytes, expected 15"),
    ],
)
def test_bad_downloads_are_refused(download: Download, tmp_path: Path, content: bytes, reason: str) -> None:
    folder = tmp_path / "kept"
    with pytest.raises(EdgeError, match=f"{reason}.*run `fetch y` and put y.tgz"):
        fetch_download(download, folder, lambda url: io.BytesIO(content))
    assert list(folder.iterdir()) == []


def test_failed_download_says_what_to_do(download: Download, tmp_path: Path) -> None:
    def opened(url: str) -> io.BytesIO:
        raise OSError("no route to host")

    with pytest.raises(EdgeError, match="no route to host.*TEST_REGISTRY=https.*fetch y"):
        fetch_download(download, tmp_path / "kept", opened)
    (tmp_path / "y.tgz").write_bytes(b"something else")
    with pytest.raises(UsageError, match="delete it"):
        fetch_download(download, tmp_path)


def test_only_web_addresses(download: Download, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REGISTRY", "file:///etc")
    with pytest.raises(UsageError, match="begins with https"):
        fetch_download(download, tmp_path)


def test_damaged_bible(tmp_path: Path) -> None:
    package = tmp_path / "x.deb"
    package.write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match="not a Debian package"):
        chapters(package)
    package.write_bytes(b"!<arch>\n")
    with pytest.raises(UsageError, match=r"no data\.tar\.xz"):
        chapters(package)
