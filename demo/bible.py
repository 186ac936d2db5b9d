"""King James Bible (1611, public domain) out of the Debian package bible-kjv-text, without dpkg and its own reader.

The package is an `ar` archive with data.tar.xz in it, and in that usr/lib/bible.data: after a header of 0x50 bytes come
big-endian 32-bit words (0, window size, number of windows W, then W + 1 offsets), then per window the codes of one
`compress` (.Z) stream of 16 bits, block mode, without its 3-byte magic. A line of the text is "Ge1:1 In the beginning".
"""

from __future__ import annotations

import io
import re
import struct
import tarfile
from itertools import pairwise
from pathlib import Path

from runtime.errors import UsageError

_DATA_FILE = "./usr/lib/bible.data"
_TABLE = 0x50
_CLEAR = 256  # the code that empties the table
_MAX_BITS = 16
_VERSE = re.compile(r"(\d?[A-Za-z]+)(\d+):(\d+) (.+)")


def chapters(package: Path) -> dict[str, str]:
    """Text of every chapter by name ("Ge1", 1,189 of them), one line per verse, without verse numbers.

    Raises UsageError when the file is not that package.
    """
    found: dict[str, list[str]] = {}
    for line in _unpack(_data_member(package)).decode("ascii").splitlines()[1:]:
        verse = _VERSE.fullmatch(line)
        if verse is None:
            raise UsageError(f"{package}: expected a verse, found {line[:60]!r}")
        found.setdefault(verse[1] + verse[2], []).append(verse[4])
    return {name: "\n".join(verses) for name, verses in found.items()}


def _data_member(package: Path) -> bytes:
    raw = package.read_bytes()
    if not raw.startswith(b"!<arch>\n"):
        raise UsageError(f"{package}: not a Debian package")
    at = 8
    while at + 60 <= len(raw):
        name, size = raw[at : at + 16].strip(), int(raw[at + 48 : at + 58])
        if name == b"data.tar.xz":
            with tarfile.open(fileobj=io.BytesIO(raw[at + 60 : at + 60 + size])) as tar:
                member = tar.extractfile(_DATA_FILE) if _DATA_FILE in tar.getnames() else None
                if member is None:
                    break
                return member.read()
        at += 60 + size + size % 2
    raise UsageError(f"{package}: no data.tar.xz with {_DATA_FILE} in it")


def _unpack(data: bytes) -> bytes:
    window_bytes, windows = struct.unpack_from(">2I", data, _TABLE + 4)
    offsets = struct.unpack_from(f">{windows + 1}I", data, _TABLE + 12)
    texts = [_decompress(data[start:end]) for start, end in pairwise(offsets)]
    if any(len(text) != window_bytes for text in texts[:-1]):
        raise UsageError(f"{_DATA_FILE}: damaged: a window is not {window_bytes} bytes")
    return b"".join(texts)


def _decompress(codes: bytes) -> bytes:
    """LZW as `compress` writes it: codes of 9 bits growing to 16, low bits first, in groups of 8 codes."""
    table = [bytes([value]) for value in range(256)] + [b""]
    bits, at, previous, out = 9, 0, b"", []
    group_start = 0
    while at + bits <= len(codes) * 8:
        code = (int.from_bytes(codes[at >> 3 : (at >> 3) + 4], "little") >> (at & 7)) & ((1 << bits) - 1)
        at += bits
        if code == _CLEAR:
            del table[257:]
            at, bits, previous = _next_group(group_start, at, bits), 9, b""
            group_start = at
            continue
        if code > len(table) or (code == len(table) and not previous):
            raise UsageError(f"{_DATA_FILE}: damaged: code {code} before it is known")
        entry = table[code] if code < len(table) else previous + previous[:1]
        out.append(entry)
        if previous and len(table) < 1 << _MAX_BITS:
            table.append(previous + entry[:1])
            if len(table) == 1 << bits and bits < _MAX_BITS:
                at, bits = _next_group(group_start, at, bits), bits + 1
                group_start = at
        previous = entry
    return b"".join(out)


def _next_group(start: int, at: int, bits: int) -> int:
    """Where codes of another width begin: after a whole group of 8 codes of the old width."""
    group = 8 * bits
    return start + -(-(at - start) // group) * group
