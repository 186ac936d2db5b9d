"""TensorRT, where it is installed: which of its two packages, which release, and how to get it where it is missing.

TensorRT 10.3 (JetPack 6.2), 10.16 (JetPack 7.2), 11 and TensorRT-RTX share the calls that this project makes; where
they differ, the code asks for the feature (`has`), never for a version.
"""

from __future__ import annotations

import importlib
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runtime.errors import UsageError, first_line

Flavour = Literal["tensorrt", "tensorrt-rtx"]
_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
Import = Callable[[str], Any]


@dataclass(frozen=True)
class Library:
    """An imported TensorRT; `module` is its Python module."""

    module: Any
    flavour: Flavour
    version: str

    def __str__(self) -> str:
        return f"{'TensorRT' if self.flavour == 'tensorrt' else 'TensorRT-RTX'} {self.version}"


def load(flavours: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx"), find: Import | None = None) -> Library:
    """The first of `flavours` that can be imported; `find` stands for importlib.import_module.

    Raises UsageError with one line that says what is missing and what installs it on this machine.
    """
    find = find or importlib.import_module
    problems = []
    for flavour in flavours:
        name = _MODULES[flavour]
        try:
            module = find(name)
            version = str(module.__version__)
        except (ImportError, OSError, AttributeError) as error:  # a missing library of its own is an OSError
            problems.append(f"{name}: {first_line(error)}")
            continue
        return Library(module, flavour, version)
    raise UsageError(f"TensorRT cannot be used ({'; '.join(problems)}): {cure(flavours)}")


def cure(flavours: tuple[Flavour, ...] = ("tensorrt",), root: Path = Path("/")) -> str:
    """What installs TensorRT on this machine, in one line."""
    release = jetpack(root)
    if release is not None:
        python = {6: "python3.10", 7: "python3.12"}.get(release, "the system's python3")
        return (
            f"on JetPack {release} run: sudo apt-get install python3-libnvinfer, then make the environment again so "
            f"that it sees it: make setup-board PYTHON={python}"
        )
    if "tensorrt-rtx" in flavours and platform.machine() == "x86_64" and sys.platform == "linux":
        return "run: pip install 'remoe-edge[rtx]'"
    return "install NVIDIA's TensorRT (docs.nvidia.com/deeplearning/tensorrt), or choose another --backend"


def jetpack(root: Path = Path("/")) -> int | None:
    """The major release of JetPack on this board: L4T R36 is 6, R38 and R39 are 7. None elsewhere."""
    try:
        text = (root / "etc/nv_tegra_release").read_text()
    except OSError:
        return None
    found = re.search(r"R(\d+)", text)
    if found is None:
        return None
    return {35: 5, 36: 6, 38: 7, 39: 7}.get(int(found[1]), int(found[1]) - 30)


def has(owner: Any, name: str) -> bool:
    """Whether this release of TensorRT has an attribute or method."""
    return getattr(owner, name, None) is not None


def make_logger(library: Library, lines: list[str]) -> Any:
    """A TensorRT logger that appends warnings and errors to `lines` instead of writing them to the terminal."""
    trt = library.module

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                lines.append(f"{severity.name if hasattr(severity, 'name') else severity}: {message}")

    return Logger()
