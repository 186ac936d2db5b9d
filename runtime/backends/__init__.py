"""Back-ends by name. Only the chosen one is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from runtime.errors import UsageError

if TYPE_CHECKING:
    import torch

    from runtime.backends.base import Backend
    from runtime.bundle import Bundle

BackendName = Literal["auto", "torch", "onnxruntime", "tensorrt"]


def choose(name: str) -> tuple[str, str]:
    """The back-end that `name` stands for, and the reason in words. Raises UsageError for what cannot run here."""
    if name == "auto":
        return "torch", "torch: the default on a CPU"
    if name == "tensorrt":
        raise UsageError(
            "the TensorRT back-end is not part of this release: use --backend torch or --backend onnxruntime"
        )
    if name in ("torch", "onnxruntime"):
        return name, f"{name}: asked for"
    raise UsageError(f"unknown back-end {name!r} (known: auto, torch, onnxruntime, tensorrt)")


def weight_bytes(name: str, bundle: Bundle, dtype: torch.dtype) -> int:
    """Memory that a back-end will hold for the dense weights of a bundle, bytes."""
    if name == "onnxruntime":
        from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend.weight_bytes(bundle, dtype)
    from runtime.backends.torch_backend import TorchBackend

    return TorchBackend.weight_bytes(bundle, dtype)


def create(name: str, bundle: Bundle, dtype: torch.dtype) -> Backend:
    """Load the dense weights into a back-end chosen by `choose`."""
    if name == "onnxruntime":
        from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend(bundle, dtype)
    from runtime.backends.torch_backend import TorchBackend

    return TorchBackend(bundle, dtype)
