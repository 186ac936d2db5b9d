"""TensorRT-RTX in tests: on machines that it is made for, its absence is an error of the installation, not a skip."""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec

import pytest

_SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"
if _SUPPORTED and find_spec("tensorrt_rtx") is None:
    raise ImportError("tensorrt_rtx is missing: pip install 'remoe-edge[test]' brings it on x86-64 Linux")

needs_rtx = pytest.mark.skipif(not _SUPPORTED, reason="TensorRT-RTX exists for x86-64 only")
