"""Sessions of ONNX Runtime over the graphs of one bundle: checked before anything parses them, and run.

A graph's external data points into the bundle's own files, which a session finds through the bundle's directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from blake3 import blake3

from runtime.bundle import Bundle
from runtime.errors import BundleError, EdgeError, UsageError, first_line
from runtime.layout import graph_file
from runtime.storage import open_file

Arrays = dict[str, np.ndarray]
Provider = Literal["cpu", "cuda"]
_CHUNK_BYTES = 16 << 20
_PROVIDERS: dict[Provider, list[str]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}
_CUDA_CURE = (
    "run `pip uninstall onnxruntime onnxruntime-gpu` and `pip install 'remoe-edge[onnxruntime-gpu]'` with a matching "
    "CUDA, or choose --backend torch"
)


class SessionFactory:
    """Opens checked graphs of one bundle as sessions with equal options."""

    def __init__(self, bundle: Bundle, dtype_name: str, threads: int, provider: Provider) -> None:
        """Raises UsageError when ONNX Runtime or the provider is not there."""
        self._ort = _import_onnxruntime()
        self._bundle = bundle
        self._dtype_name = dtype_name
        self._threads = threads
        self._provider = provider
        available = self._ort.get_available_providers()
        if _PROVIDERS[provider][0] not in available:
            raise UsageError(
                f"ONNX Runtime on CUDA was asked for, but the installed package offers {', '.join(available)}: "
                + _CUDA_CURE
            )

    @contextmanager
    def weights(self, file: str) -> Iterator[None]:
        """Check a file of weights; afterwards its pages leave the page cache, where the sessions found them."""
        entry = self._bundle.manifest.files[file]
        descriptor = open_file(self._bundle.directory, file, entry.bytes)
        try:
            digest = xxhash.xxh3_64()
            while chunk := os.read(descriptor, _CHUNK_BYTES):
                digest.update(chunk)
            if digest.hexdigest() != entry.xxh3:
                raise BundleError(
                    f"{file}: checksum {digest.hexdigest()}, expected {entry.xxh3}: the bundle is damaged; export it "
                    "again"
                )
            yield
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def open(self, part: str) -> Any:
        """The session of one part. Raises BundleError when its graph is changed or refused."""
        file = graph_file(part, self._dtype_name)
        graph = self._bundle.read(file)
        found, expected = blake3(graph).hexdigest(), self._bundle.manifest.files[file].blake3
        if found != expected:  # before anything parses it
            raise BundleError(f"{file}: BLAKE3 {found}, expected {expected}: the bundle is damaged; export it again")
        try:
            session = self._ort.InferenceSession(bytes(graph), self._options(), providers=_PROVIDERS[self._provider])
        except Exception as error:  # ONNX Runtime has one exception class per status code
            raise BundleError(f"{file}: ONNX Runtime refuses the graph: {first_line(error)}") from error
        if self._provider == "cuda":
            _require_cuda(session, file)
        return session

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Both grow with every new number of cached tokens and never shrink.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        entries = {
            "session.intra_op.allow_spinning": "0",  # the reader threads need the cores
            "session.model_external_initializers_file_folder_path": f"/proc/self/fd/{self._bundle.directory}/dense",
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        return options


def run_session(session: Any, outputs: Sequence[str], feeds: Arrays) -> list[torch.Tensor]:
    """Run a session on numpy views of CPU tensors; the results are tensors over ONNX Runtime's memory."""
    try:
        return [torch.from_numpy(array) for array in session.run(outputs, feeds)]
    except Exception as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        raise EdgeError(f"ONNX Runtime failed on {shapes}: {first_line(error)}: try --backend torch") from error


def _require_cuda(session: Any, file: str) -> None:
    """A session that quietly runs on the CPU is an error. Whether kernels really run shows in the first step."""
    session.disable_fallback()
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise UsageError(f"{file}: ONNX Runtime fell back to {session.get_providers()} from CUDA: " + _CUDA_CURE)


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"onnxruntime is not usable ({error}): pip install 'remoe-edge[onnxruntime]'") from None
    return onnxruntime
