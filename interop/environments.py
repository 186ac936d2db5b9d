"""Environments of their own for engines whose packages would not live together: made once, with pip.

An overlay sees the packages of the environment that makes it and adds to them; the other kind has everything itself.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PATIENCE_S = 3600


class NotRunError(Exception):
    """A check cannot be made here; the reason is the message."""


@dataclass(frozen=True)
class Kind:
    """`module`: must be importable in it. `free_bytes`: what it takes on the disk, with room for unpacking."""

    name: str
    module: str
    overlay: bool
    free_bytes: int
    python: tuple[int, int] = (3, 10)

    @property
    def requirements(self) -> Path:
        """The pinned packages."""
        return Path(__file__).with_name(f"requirements-{self.name}.txt")


VLLM = Kind("vllm", "vllm", overlay=False, free_bytes=5 << 30, python=(3, 11))
LLAMA = Kind("llama", "xllamacpp", overlay=True, free_bytes=300 << 20)
LM_EVAL = Kind("lm-eval", "lm_eval", overlay=True, free_bytes=1 << 30)


@dataclass(frozen=True)
class Installer:
    """Where environments lie, which torch goes into those that need their own, and what pip is told in addition."""

    folder: Path
    torch: str
    pip_args: tuple[str, ...] = ()

    def python(self, kind: Kind) -> Path:
        """The interpreter of an environment, made now if it is not there. Raises NotRunError with the reason."""
        home = self.folder / kind.name
        python, stamp = home / "bin/python", home / "interop.stamp"
        mark = self._mark(kind)
        if stamp.is_file() and stamp.read_text() == mark:
            return python
        self._make(kind, home, python)
        stamp.write_text(mark)
        return python

    def _mark(self, kind: Kind) -> str:
        facts = f"{sys.version} {sys.prefix} {self.torch}".encode() + kind.requirements.read_bytes()
        return hashlib.sha256(facts).hexdigest()

    def _make(self, kind: Kind, home: Path, python: Path) -> None:
        if sys.version_info < kind.python:
            raise NotRunError(
                f"{kind.name} needs Python {'.'.join(map(str, kind.python))}, this is {sys.version.split()[0]}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < kind.free_bytes:
            raise NotRunError(f"{kind.name} needs {kind.free_bytes >> 20} MiB in {self.folder}, {free >> 20} are free")
        shutil.rmtree(home, ignore_errors=True)
        log = self.folder / f"{kind.name}-install.log"
        log.unlink(missing_ok=True)
        _call([sys.executable, "-m", "venv", str(home)], log)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *self.pip_args]
        if kind.overlay:
            packages = Path(_purelib(python))
            (packages / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
            _call([*pip, "-r", str(kind.requirements)], log)
        else:
            _call([*pip, self.torch], log)
            _call([*pip, "--no-deps", "-r", str(kind.requirements)], log)
        _call([str(python), "-c", f"import {kind.module}"], log)


def _purelib(python: Path) -> str:
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _call(command: list[str], log: Path) -> None:
    """Run a step of an installation. Raises NotRunError with the last words of what failed."""
    with log.open("a", encoding="utf-8") as file:
        try:
            code = subprocess.run(command, stdout=file, stderr=file, check=False, timeout=_PATIENCE_S).returncode
        except subprocess.TimeoutExpired:
            code = -1
    if code:
        raise NotRunError(f"{' '.join(command[1:4])} ...: exit code {code}: {last_words(log)} (all of it: {log})")


def run_module(python: Path, module: str, arguments: list[str], log: Path, **variables: str) -> None:
    """Run a module of this checkout in another environment. Raises RuntimeError with its last words."""
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [str(python), "-m", module, *arguments], cwd=ROOT, env={**os.environ, **variables}, stdout=file,
            stderr=file, check=False, timeout=_PATIENCE_S,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{module}: exit code {done.returncode}: {last_words(log)} (all of it: {log})")


def last_words(log: Path) -> str:
    """The last line that says what went wrong, or just the last one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1][:300]
