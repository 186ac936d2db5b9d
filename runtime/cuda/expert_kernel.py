"""The two kernels of expert.cu: compiled once for this machine's GPU by its own nvcc, kept privately, launched.

Compiled code is executable code: it is kept like TensorRT engines are, in a place that only this user can write.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from runtime.config import ModelConfig
from runtime.cuda.driver import Gpu
from runtime.engine_store import default_root
from runtime.errors import EdgeError, UsageError
from runtime.private_files import check_private, read_private, write_private

SOURCE = Path(__file__).with_name("expert.cu")
THREADS = 128  # four rows per block
_ROWS_PER_BLOCK = THREADS // 32
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_TIMEOUT_S = 300


class ExpertKernel:
    """One token through one expert, in two launches: fp16 in, fp32 out."""

    def __init__(self, config: ModelConfig, gpu: Gpu, driver: Any = None, image: bytes | None = None) -> None:
        """`driver` stands for cuda.bindings.driver, `image` for the compiled kernels.

        Raises UsageError where rows have no multiple of 8 values, or there is no nvcc.
        """
        self._hidden, self._inner = config.hidden_size, config.expert_intermediate_size
        if self._hidden % 8 or self._inner % 8:
            raise UsageError(
                f"the fused expert kernel needs rows of a multiple of 8 values, this model has {self._hidden} and "
                f"{self._inner}: --expert-kernel torch"
            )
        self._activation = _ACTIVATIONS[config.activation]
        self._driver = driver if driver is not None else _import_driver()
        module = self._call("cuModuleLoadData", image if image is not None else compiled(gpu.capability))
        self._gate_up = self._call("cuModuleGetFunction", module, b"edge_gate_up")
        self._down = self._call("cuModuleGetFunction", module, b"edge_down")

    def run(self, h: int, slot: int, mixed: int, y: int, stream: int) -> None:
        """Addresses of h [H] fp16, the blob, scratch [I] fp32 and y [H] fp32; given to the stream."""
        hidden, inner = self._hidden, self._inner
        down = slot + 2 * (2 * inner * hidden)
        types = (_POINTER, _POINTER, _POINTER, _INT, _INT, _INT)
        self._launch(self._gate_up, inner, ((slot, h, mixed, hidden, inner, self._activation), types), stream)
        self._launch(self._down, hidden, ((down, mixed, y, hidden, inner), types[:-1]), stream)

    def _launch(self, function: Any, rows: int, arguments: Any, stream: int) -> None:
        blocks = -(-rows // _ROWS_PER_BLOCK)
        self._call("cuLaunchKernel", function, blocks, 1, 1, THREADS, 1, 1, 0, stream, arguments, 0)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._driver, name)(*arguments)
        if int(error) != 0:
            raise EdgeError(f"{name} failed ({error}): --expert-kernel torch does without")
        return values[0] if values else None


def compiled(capability: str) -> bytes:
    """The kernels for one GPU ("87"), compiled on first use. Raises UsageError where there is no nvcc."""
    source = SOURCE.read_bytes()
    nvcc, version = find_nvcc()
    name = hashlib.sha256(source + f"{capability} {version}".encode()).hexdigest()[:24]
    folder = default_root() / "kernels"
    path = folder / f"expert-sm_{capability}-{name}.cubin"
    try:
        check_private(folder)
        return read_private(path, path.stat().st_size)
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_private(folder)
        write_private(path, build(nvcc, capability))
        return read_private(path, path.stat().st_size)


def build(nvcc: str, capability: str) -> bytes:
    """The cubin of expert.cu. Raises EdgeError with nvcc's first complaint."""
    with tempfile.TemporaryDirectory(prefix="remoe-kernel-") as folder:
        out = Path(folder) / "expert.cubin"
        command = [
            nvcc,
            "-cubin",
            f"-arch=sm_{capability}",
            "-O3",
            "-Werror",
            "all-warnings",
            "-o",
            str(out),
            str(SOURCE),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode != 0:
            words = (done.stderr or done.stdout).strip().splitlines()[:1] or ["no reason given"]
            raise EdgeError(f"nvcc cannot compile {SOURCE.name} for sm_{capability}: {words[0]}: --expert-kernel torch")
        return out.read_bytes()


def find_nvcc() -> tuple[str, str]:
    """Path and version of the CUDA compiler. Raises UsageError where there is none."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin")
    if found is None:
        raise UsageError(
            "the fused expert kernel is compiled by nvcc, which is not here: sudo apt-get install cuda-nvcc-12-6 on "
            "JetPack 6, or --expert-kernel torch"
        )
    done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return found, " ".join(done.stdout.split()[-2:])


def _import_driver() -> Any:
    from cuda.bindings import driver

    return driver
