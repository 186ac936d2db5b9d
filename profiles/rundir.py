"""The folder of a profiling run: what is in it, how it is written, and how it is read again, whole or cut off.

    run.json          what ran and how: everything that it takes to do it again
    tokens.jsonl      per request a line `request`, a line per token (docs/records.md), a line `request_end`
    telemetry.jsonl   a line per sample (docs/profiling.md)
    summary.json      figures, written last; a folder without it was cut off

docs/profiling.md describes them field by field.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from profiles.telemetry.reading import Reading
from profiles.telemetry.source import Sample
from runtime.errors import EdgeError, UsageError
from runtime.records import TokenRecord

FORMAT = 1
_NEEDED = ("bundle", "workload", "protocol", "requests", "machine", "start_time")
HEADER, TOKENS, TELEMETRY, SUMMARY = "run.json", "tokens.jsonl", "telemetry.jsonl", "summary.json"


@dataclass
class Request:
    """One prompt and its answer. `records[0]` is the prefill; `complete` is False when it was cut off."""

    index: int
    prompt_id: str
    prompt_tokens: int
    repeat: int
    start_ns: int
    records: list[TokenRecord] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def complete(self) -> bool:
        return self.finish_reason is not None

    @property
    def decode(self) -> list[TokenRecord]:
        """The tokens after the first: what TPOT is about."""
        return self.records[1:]


@dataclass
class Run:
    """A run as it lies on disk."""

    path: Path
    header: dict[str, Any]
    requests: list[Request]
    samples: list[Sample]
    summary: dict[str, Any] | None


class RunWriter:
    """Creates the folder and writes into it; what is written stays readable however the process ends."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError when the folder is there already or cannot be made."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            raise UsageError(f"{path} exists: a run never writes over another one; name a new folder") from None
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from None
        self.path = path
        # Written line by line, so that a run that is killed keeps all but its last one; the engine's clock stands still
        # while a token is written.
        self._tokens = open(path / TOKENS, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
        self._telemetry = open(path / TELEMETRY, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._lock = threading.Lock()  # samples come from a thread of their source

    def header(self, facts: dict[str, Any]) -> None:
        self._replace(HEADER, {"format": FORMAT, **facts})

    def sample(self, sample: Sample) -> None:
        with self._lock:
            if not self._telemetry.closed:  # the last sample may come while the run is being closed
                _write(self._telemetry, sample.to_json())

    def begin(self, request: Request) -> None:
        facts = {k: getattr(request, k) for k in ("index", "prompt_id", "prompt_tokens", "repeat", "start_ns")}
        _write(self._tokens, {"type": "request", **facts})

    def token(self, request: int, record: TokenRecord) -> None:
        _write(self._tokens, {**record.to_json(), "request": request})

    def end(self, request: int, finish_reason: str, text: str) -> None:
        _write(self._tokens, {"type": "request_end", "index": request, "finish_reason": finish_reason, "text": text})

    def summary(self, figures: dict[str, Any]) -> None:
        self._replace(SUMMARY, figures)

    def close(self) -> None:
        with self._lock:
            self._telemetry.close()
        self._tokens.close()

    def discard(self) -> None:
        """Take the folder away again: nothing was measured."""
        self.close()
        shutil.rmtree(self.path)

    def _replace(self, name: str, value: dict[str, Any]) -> None:
        """The file is there whole or not at all."""
        partial = self.path / f"{name}.partial"
        partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, self.path / name)


def load_run(path: Path) -> Run:
    """Read a run, complete or cut off. Raises UsageError for a folder that is none, or of another format."""
    header = _json(path / HEADER, path)
    if header.get("format") != FORMAT:
        raise UsageError(f"{path / HEADER}: format {header.get('format')!r}, this release reads {FORMAT}")
    missing = [name for name in _NEEDED if name not in header]
    if missing:
        raise UsageError(f"{path / HEADER}: field {missing[0]!r} is missing: not written by edge profile")
    summary = _json(path / SUMMARY, path) if (path / SUMMARY).exists() else None
    name = TELEMETRY
    try:
        samples = [Sample(row["time_ns"], _reading(row)) for row in _lines(path / TELEMETRY)]
        name = TOKENS
        requests = _requests(path / TOKENS)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path / name}: not written by edge profile ({error!r:.80})") from None
    return Run(path, header, requests, samples, summary)


def _requests(path: Path) -> list[Request]:
    found: dict[int, Request] = {}
    for row in _lines(path):
        kind = row.pop("type")
        if kind == "request":
            found[row["index"]] = Request(**row)
        elif kind == "request_end":
            found[row["index"]].finish_reason = row["finish_reason"]
        else:
            found[row.pop("request")].records.append(TokenRecord(**row))
    return list(found.values())


def _reading(row: dict[str, Any]) -> Reading:
    return Reading.from_json({k: v for k, v in row.items() if k not in ("type", "time_ns")})


def _json(path: Path, run: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{run} is no run of edge profile: {path.name}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected an object")
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a last line without its end was being written when the run was cut off."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith("\n"):
                    return
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise UsageError(f"{path}: line {number}: not valid JSON ({error})") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start} of a block): damaged") from None


def _write(file: IO[str], line: dict[str, Any]) -> None:
    """Raises EdgeError naming the file."""
    try:
        file.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
    except OSError as error:
        raise EdgeError(f"{file.name}: {error.strerror}") from None
