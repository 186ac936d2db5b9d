"""The fused expert kernel: it compiles for the board, computes what it should (its source, run on a CPU lane by lane),
and is launched with the right places and sizes.
"""

from __future__ import annotations

import ctypes
import shutil
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from runtime.cuda import expert_kernel
from runtime.cuda.expert_kernel import SOURCE, ExpertKernel, build, compiled, find_nvcc
from runtime.errors import EdgeError, UsageError
from tests.parity.dense_models import MODELS, reference_expert
from tests.unit.fake_cuda import ORIN

CONFIG = replace(MODELS["mha"], expert_intermediate_size=40, hidden_size=264)  # no multiples of a warp's 256 values
HARNESS = r"""
#include "cuda_on_cpu.h"
#include SOURCE
extern "C" void run(const __half* blob, const __half* h, float* mixed, float* y, int hidden, int inner, int kind,
                    unsigned threads) {
    const unsigned rows = threads / 32;
    launch((inner + rows - 1) / rows, threads, [&] { edge_gate_up(blob, h, mixed, hidden, inner, kind); });
    const __half* down = blob + 2ll * inner * hidden;
    launch((hidden + rows - 1) / rows, threads, [&] { edge_down(down, mixed, y, hidden, inner); });
}
"""
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")


@needs_nvcc
@pytest.mark.parametrize("capability", ["87", "86"])
def test_it_compiles_without_a_warning(capability: str) -> None:
    image = build(find_nvcc()[0], capability)
    assert image.startswith(b"\x7fELF") and b".text.edge_gate_up" in image and b".text.edge_down" in image


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels' source compiled for this processor, 32 threads to a warp."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "harness.cpp").write_text(HARNESS)
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{Path(__file__).parent}",
               f'-DSOURCE="{SOURCE}"', "-o", str(folder / "kernel.so"), str(folder / "harness.cpp")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "_Float16" in done.stderr:
        pytest.skip("this g++ has no half precision")
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "kernel.so")).run


@pytest.mark.parametrize(("kind", "activation"), list(enumerate(["silu", "gelu", "gelu_tanh"])))
def test_it_computes_the_expert(on_cpu: Any, kind: int, activation: str) -> None:
    """Against fp64, with gates so large that fp16 in between would overflow."""
    config = replace(CONFIG, activation=activation)
    random = np.random.default_rng(kind)
    shapes = config.expert_shapes
    blob = {name: torch.from_numpy(random.standard_normal(shape)).half() for name, shape in shapes.items()}
    h = torch.from_numpy(random.standard_normal(config.hidden_size) * 30).half()
    values = torch.cat([blob[name].flatten() for name in ("gate", "up", "down")])
    y, mixed = torch.empty(config.hidden_size), torch.empty(config.expert_intermediate_size)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (values, h, mixed, y))
    on_cpu(*pointers, config.hidden_size, config.expert_intermediate_size, kind, expert_kernel.THREADS)
    expected = reference_expert(config, h.double()[None], blob)[0]
    assert mixed.abs().max() > 65_504
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


class Driver:
    """cuda.bindings.driver, recording."""

    def __init__(self, error: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._error = error

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return (self._error,) if name == "cuLaunchKernel" else (0, f"{name} {len(self.calls)}")

        return call


def test_launches_with_the_right_places_and_sizes() -> None:
    driver = Driver()
    kernel = ExpertKernel(CONFIG, ORIN, driver, b"image")
    kernel.run(h=1000, slot=4096, mixed=5000, y=6000, stream=7)
    assert driver.calls[0] == ("cuModuleLoadData", b"image")
    assert [call[2] for call in driver.calls[1:3]] == [b"edge_gate_up", b"edge_down"]
    first, second = driver.calls[3:]
    # 40 rows and 264 rows, four to a block; the down matrix lies behind two of 40 x 264 fp16 values.
    assert first[2:9] == (10, 1, 1, 128, 1, 1, 0) and first[9] == 7
    assert first[10][0] == (4096, 1000, 5000, 264, 40, 0)
    assert second[2:9] == (66, 1, 1, 128, 1, 1, 0)
    assert second[10][0] == (4096 + 2 * 2 * 40 * 264, 5000, 6000, 264, 40)
    for launch in (first, second):
        assert len(launch[10][0]) == len(launch[10][1])


def test_refusals() -> None:
    with pytest.raises(UsageError, match="a multiple of 8 values, this model has 264 and 42: --expert-kernel torch"):
        ExpertKernel(replace(CONFIG, expert_intermediate_size=42), ORIN, Driver(), b"")
    with pytest.raises(EdgeError, match="cuLaunchKernel failed"):
        ExpertKernel(CONFIG, ORIN, Driver(error=700), b"").run(1, 2, 3, 4, 5)


def test_compiled_once_and_kept_privately(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REMOE_EDGE_ENGINES", str(tmp_path / "store"))
    asked: list[str] = []
    monkeypatch.setattr(expert_kernel, "find_nvcc", lambda: ("nvcc", "13.0"))
    monkeypatch.setattr(expert_kernel, "build", lambda nvcc, capability: asked.append(capability) or b"image")
    assert [compiled("87"), compiled("87"), compiled("86")] == [b"image"] * 3
    assert asked == ["87", "86"]
    (path,) = (tmp_path / "store" / "kernels").glob("expert-sm_87-*")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o666)
    with pytest.raises(UsageError, match="not a whole file of this user alone"):
        compiled("87")


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_kernel, "shutil", SimpleNamespace(which=lambda name, path=None: None))
    with pytest.raises(UsageError, match="compiled by nvcc, which is not here"):
        find_nvcc()
