"""Runs a kernel on each device of one library and prints the outcome as JSON: a script of its own.

`edge doctor` starts it in another process, because a library that does not fit the processor or the GPU may end with
an illegal instruction instead of an error. A list of providers, or `is_available()`, proves nothing; a result does.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # name, ok, found
_SIZE = 64


def probe_torch() -> Iterator[Row]:
    """torch on the CPU in each compute dtype, and on each CUDA device."""
    import torch

    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        name = "torch cpu" if device.type == "cpu" else f"torch cuda:{device.index}"
        yield _row(name, lambda device=device: _torch_kernels(torch, device))  # type: ignore[misc]


def probe_native() -> Iterator[Row]:
    """The compiled library of this package: a product by its kernel, and a blob by its reader."""
    yield _row("compiled kernel", _compiled_kernel)
    yield _row("compiled reader", _compiled_reader)


def probe_onnxruntime() -> Iterator[Row]:
    """Each execution provider of ONNX Runtime that computes."""
    import onnxruntime

    for provider in onnxruntime.get_available_providers():
        if provider != "AzureExecutionProvider":  # it asks a service
            short = provider.removesuffix("ExecutionProvider").lower()
            yield _row(f"onnxruntime {short}", lambda p=provider: _onnx_kernel(onnxruntime, p))  # type: ignore[misc]


def probe_tensorrt() -> Iterator[Row]:
    """TensorRT's library can be loaded; engines are built from a bundle's graphs only."""

    def load() -> str:
        import tensorrt

        tensorrt.Logger()
        return str(tensorrt.__version__)

    yield _row("tensorrt", load)


def _torch_kernels(torch: Any, device: Any) -> str:
    left = torch.arange(_SIZE * _SIZE, dtype=torch.float64).reshape(_SIZE, _SIZE).remainder(7) - 3
    expected = left @ left.T
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = left.to(device, dtype)
        # Small whole numbers: their products and sums are exact in fp32, and in bf16 rounded once.
        found = (values @ values.T).to("cpu", torch.float64)
        if not torch.allclose(found, expected, rtol=0.01, atol=0.5):
            raise ArithmeticError(f"a product in {dtype} is wrong")
    where = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return f"{where}torch {torch.__version__}: fp32, fp16 and bf16 products are right"


def _compiled_kernel() -> str:
    import torch

    from runtime import native

    _check_built()
    kernel = native.load(threads=1)
    if kernel is None:
        raise RuntimeError("none for this processor's instructions")
    weight = (torch.arange(_SIZE * _SIZE).reshape(_SIZE, _SIZE).remainder(7) - 3).half()
    if not torch.equal(kernel.linear(weight[:1].float(), weight), weight[:1].float() @ weight.float().T):
        raise ArithmeticError("a product is wrong")  # of small whole numbers, which is exact
    return "a product is right"


def _compiled_reader() -> str:
    import xxhash

    from runtime.layout import expert_identity
    from runtime.loader import Load, Loader
    from runtime.storage import ExpertStorage

    _check_built()
    blob, key = bytes(range(256)) * _SIZE, (0, 0)
    checksums = {key: xxhash.xxh3_64_intdigest(blob, seed=expert_identity(*key))}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "blob").write_bytes(blob)
        directory = os.open(folder, os.O_RDONLY)
        with closing(ExpertStorage(directory, {key: "blob"}, len(blob), direct=False)) as storage:
            os.close(directory)
            with closing(Loader(storage, checksums, len(blob), threads=1, compiled=True)) as loader:
                slot, done = bytearray(len(blob)), queue.SimpleQueue[Load]()
                loader.submit(*key, memoryview(slot), done)
                if error := loader.wait(done).error:
                    raise error
    if slot != blob:
        raise RuntimeError("what was read is not what is in the file")
    return "a file is read right"


def _check_built() -> None:
    from runtime import native

    if native.library() is None:
        raise RuntimeError("built for another kind of machine" if native.library_path() else "not built")


def _onnx_kernel(onnxruntime: Any, provider: str) -> str:
    import numpy as np
    from onnx import TensorProto, helper

    shape = [_SIZE, _SIZE]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "probe", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[provider])
    if session.get_providers()[0] != provider:  # it only warns where a provider's libraries are missing
        raise RuntimeError(f"fell back to {session.get_providers()[0]}")
    x = (np.arange(_SIZE * _SIZE, dtype=np.float32).reshape(shape) % 7) - 3
    (y,) = session.run(None, {"x": x})
    if not np.array_equal(y, x @ x):
        raise ArithmeticError("a product is wrong")
    return f"onnxruntime {onnxruntime.__version__}: a product is right"


def _row(name: str, work: Callable[[], str]) -> Row:
    try:
        return {"name": name, "ok": True, "found": work()}
    except Exception as error:  # the outcome of a probe is the error, whatever kind it is
        return {"name": name, "ok": False, "found": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


PROBES = {
    "torch": probe_torch,
    "runtime.native": probe_native,
    "onnxruntime": probe_onnxruntime,
    "tensorrt": probe_tensorrt,
}

if __name__ == "__main__":
    sys.path.extend(sys.argv[2:])
    for row in PROBES[sys.argv[1]]():
        print(json.dumps(row), flush=True)
