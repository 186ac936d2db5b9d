"""Back-ends by name. Only the chosen one is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from runtime.errors import UsageError

if TYPE_CHECKING:
    import torch

    from runtime.backends.base import Backend
    from runtime.bundle import Bundle

BackendName = Literal["auto", "torch", "onnxruntime", "cuda", "onnxruntime-cuda", "tensorrt"]
ON_CPU = ("torch", "onnxruntime")
ExpertKernelName = Literal["torch", "fused"]
GPU_CONTEXT_BYTES = 300_000_000  # what a process that touches the GPU of an Orin takes beside its data
_DEFAULT = "torch: the default on a CPU"


def choose(name: str, bundle: Bundle | None = None, context: int = 1) -> tuple[str, str]:
    """The back-end that `name` stands for, and the reason in words. Raises UsageError for an unknown name.

    `auto` is TensorRT where the engines of `bundle` for `context` tokens are built, else torch on a GPU that has run a
    kernel, else torch on the CPU.
    """
    if name == "auto":
        return _automatic(bundle, context)
    if name in get_args(BackendName):
        return name, f"{name}: asked for"
    raise UsageError(f"unknown back-end {name!r} (known: {', '.join(get_args(BackendName))})")


def weight_bytes(name: str, bundle: Bundle, dtype: torch.dtype) -> int:
    """Memory that a back-end will hold for the dense weights of a bundle, bytes, and for its context on a GPU.

    It is counted as the machine's memory, which it is on a board; a GPU with memory of its own needs less of that.
    """
    return _dense_bytes(name, bundle, dtype) + (0 if name in ON_CPU else GPU_CONTEXT_BYTES)


def scratch_bytes(name: str, bundle: Bundle, context: int) -> int:
    """What the dense parts compute in, where that is much: TensorRT keeps it for the greatest shapes all the time."""
    if name != "tensorrt":
        return 0
    from runtime.graph_io import BLOCK_TOKENS, attention_scratch_bytes

    return attention_scratch_bytes(bundle.config, context, min(BLOCK_TOKENS, context))


def _dense_bytes(name: str, bundle: Bundle, dtype: torch.dtype) -> int:
    if name.startswith("onnxruntime"):
        from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend.weight_bytes(bundle, dtype)
    files = bundle.manifest.files
    stored = sum(e.bytes for name, e in files.items() if name.startswith("dense/") and name.endswith("tensors"))
    # Engines hold the weights as they are stored, torch holds them in the compute dtype.
    return stored if name == "tensorrt" else stored * dtype.itemsize // 2


def create(
    name: str,
    bundle: Bundle,
    dtype: torch.dtype,
    context: int = 1,
    cuda_graphs: bool = False,
    expert_kernel: ExpertKernelName = "torch",
) -> Backend:
    """Load the dense weights into a back-end chosen by `choose`, for a run over `context` tokens.

    Raises UsageError where what it needs is missing.
    """
    if cuda_graphs and name != "tensorrt":
        raise UsageError(f"--cuda-graphs launches TensorRT's engines, but the back-end is {name}: --backend tensorrt")
    if name in ("cuda", "tensorrt"):
        return _on_gpu(name, bundle, dtype, context, cuda_graphs, expert_kernel)
    if expert_kernel != "torch":
        raise UsageError(f"--expert-kernel {expert_kernel} runs on a GPU, but the back-end is {name}: --backend cuda")
    if name in ("onnxruntime", "onnxruntime-cuda"):
        from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, dtype, provider="cuda" if name.endswith("cuda") else "cpu")
    from runtime.backends.torch_backend import TorchBackend

    return TorchBackend(bundle, dtype)


def _on_gpu(
    name: str, bundle: Bundle, dtype: torch.dtype, context: int, cuda_graphs: bool, expert_kernel: ExpertKernelName
) -> Backend:
    from runtime.backends.cuda_backend import CudaBackend
    from runtime.backends.tensorrt_backend import TensorRTBackend

    backend: CudaBackend | TensorRTBackend
    if name == "tensorrt":
        backend = TensorRTBackend(bundle, dtype, context, graphs=cuda_graphs)
    else:
        backend = CudaBackend(bundle, dtype)
    if expert_kernel == "fused":
        backend.fuse_experts()
    return backend


def has_nvidia_gpu(root: Path = Path("/")) -> bool:
    """Whether the kernel shows an NVIDIA GPU, discrete or of a Jetson, whatever software there is for it."""
    return any((root / name).exists() for name in ("dev/nvidia0", "dev/nvhost-gpu", "proc/driver/nvidia/version"))


def _automatic(bundle: Bundle | None, context: int) -> tuple[str, str]:
    if not has_nvidia_gpu():  # answers at once: libraries of a GPU take seconds to load
        return "torch", _DEFAULT
    from runtime.cuda.device import open_device

    try:
        gpu = open_device().cuda.gpu.name
    except UsageError as error:
        return "torch", f"{_DEFAULT}; there is a GPU, but {error}"
    if bundle is None:
        return "cuda", f"cuda: torch computes on {gpu}"
    from runtime.backends.tensorrt_backend import ready

    try:
        return "tensorrt", f"tensorrt: {ready(bundle, context)}"
    except UsageError as error:
        return "cuda", f"cuda: torch computes on {gpu}; not tensorrt: {error}"
