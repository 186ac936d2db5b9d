"""llama.cpp, from the wheel of xllamacpp: `python -m interop.llama_engine REQUEST.json OUT.npz`

The wheel's own interface answers prompts but shows no routing, so llama.cpp's C interface, which the same library
exports, is called. Structures are laid out as in the llama.h of the pinned release; their defaults are compared first.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_bool,
    c_char,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from interop.observed import Array, Observed, Request, next_scores, stack_rows

_CONTEXT = 512
_F32, _F16 = 0, 1  # enum ggml_type
_FLASH_AUTO, _FLASH_OFF = -1, 0
_CHOICES = b"ffn_moe_argsort-"  # [experts, tokens] int32, best first; llama.cpp takes the first K
_EVAL = CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)


class Tensor(Structure):
    """The head of struct ggml_tensor."""

    _fields_ = (("type", c_int32), ("buffer", c_void_p), ("ne", c_int64 * 4), ("nb", c_size_t * 4))


class Batch(Structure):
    """struct llama_batch."""

    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", c_void_p),
        ("n_seq_id", c_void_p), ("seq_id", c_void_p), ("logits", POINTER(c_int8)),
    )  # fmt: skip


class ModelParams(Structure):
    """struct llama_model_params; the defaults are kept."""

    _fields_ = (("head", c_void_p * 2), ("n_gpu_layers", c_int32), ("rest", c_char * 76))


class ContextParams(Structure):
    """struct llama_context_params."""

    _fields_ = (
        *((name, c_uint32) for name in (
            "n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq",
        )),
        *((name, c_int32) for name in (
            "n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type", "attention_type",
            "flash_attn_type",
        )),
        ("rope", c_float * 6), ("yarn_orig_ctx", c_uint32), ("defrag_thold", c_float),
        ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p), ("type_k", c_int32), ("type_v", c_int32),
        ("abort", c_void_p * 2), ("flags", c_bool * 6), ("rest", c_char * 26),
    )  # fmt: skip


def observe(request: Request) -> Observed:
    """Read the texts and answer the prompts."""
    with Llama(request.model) as llama:
        found = Observed([], [], [], [], facts={"xllamacpp": metadata.version("xllamacpp")})
        for text in request.texts:
            logits = llama.read(text, fresh=True)
            scores, best = next_scores(logits, text)
            found.experts.append(stack_rows(llama.choices(), len(text)))
            found.scores.append(scores)
            found.best.append(best)
        for prompt in request.prompts:
            answer = [int(llama.read(prompt, fresh=True)[-1].argmax())]
            while len(answer) < request.new_tokens:
                answer.append(int(llama.read(answer[-1:])[-1].argmax()))
            found.answers.append(np.array(answer))
    return found


class Llama:
    """A model and a context of llama.cpp with fp32 keys and values, and what its routers chose."""

    def __init__(self, path: str) -> None:
        """Raises RuntimeError when the library is another one, or the file cannot be loaded."""
        self._lib = _library()
        self._lib.llama_backend_init()
        self._model = self._lib.llama_model_load_from_file(path.encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._vocab = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self._top_k = _top_k(self._lib, self._model)
        self._seen: dict[int, list[Array]] = {}
        self._callback = _EVAL(self._see)  # kept alive as long as the context
        self._context = self._lib.llama_init_from_model(self._model, self._params())
        if not self._context:
            raise RuntimeError("llama.cpp makes no context of these options")

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def read(self, tokens: list[int], fresh: bool = False) -> Array:
        """Logits [T, V] of tokens that follow what was read before, or begin a new text."""
        if fresh:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
            self._seen.clear()
        count = len(tokens)
        batch = Batch(n_tokens=count, token=(c_int32 * count)(*tokens), logits=(c_int8 * count)(*[1] * count))
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode: {status}")
        logits = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(count, self._vocab)).copy()

    def choices(self) -> list[list[Array]]:
        """The experts [n, K] of each layer, in parts, since the text began."""
        return [self._seen[layer] for layer in sorted(self._seen)]

    def _params(self) -> ContextParams:
        params: ContextParams = self._lib.llama_context_default_params()
        expected = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "flash_attn_type": _FLASH_AUTO, "type_k": _F16,
                    "type_v": _F16, "defrag_thold": -1.0, "cb_eval": None}  # fmt: skip
        found = {name: getattr(params, name) for name in expected}
        if found != expected:
            raise RuntimeError(f"this llama.cpp has another llama_context_params: {found}, wanted {expected}")
        params.n_ctx = params.n_batch = params.n_ubatch = params.n_outputs_max = _CONTEXT
        params.n_outputs_max_per_seq = _CONTEXT
        params.n_threads = params.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        params.type_k = params.type_v = _F32
        params.flash_attn_type = _FLASH_OFF
        params.cb_eval = ctypes.cast(self._callback, c_void_p)
        return params

    def _see(self, address: int, ask: bool, user: object) -> bool:
        """llama.cpp's callback: asked about every node, then shown those that were wanted."""
        name: bytes = self._lib.ggml_get_name(address)
        if not name.startswith(_CHOICES):
            return not ask  # after a node was shown, True means: go on
        if not ask:
            experts, tokens = Tensor.from_address(address).ne[:2]
            ranked = np.empty((tokens, experts), np.int32)
            self._lib.ggml_backend_tensor_get(address, ranked.ctypes.data, 0, ranked.nbytes)
            self._seen.setdefault(int(name[len(_CHOICES) :]), []).append(ranked[:, : self._top_k].copy())
        return True


def _top_k(library: Any, model: int) -> int:
    text = ctypes.create_string_buffer(64)
    for name in (b"qwen2moe", b"qwen3moe", b"olmoe", b"llama", b"deepseek2"):
        if library.llama_model_meta_val_str(model, name + b".expert_used_count", text, 64) > 0:
            return int(text.value)
    raise RuntimeError("the file does not say how many experts a token takes")


def _library() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.submodule_search_locations is None:
        raise RuntimeError("xllamacpp is not installed here")
    (path,) = Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    library.llama_model_default_params.restype = ModelParams
    library.llama_context_default_params.restype = ContextParams
    library.llama_model_load_from_file.argtypes = [c_char_p, ModelParams]
    library.llama_init_from_model.argtypes = [c_void_p, ContextParams]
    library.llama_decode.argtypes = [c_void_p, Batch]
    library.llama_get_logits.restype = POINTER(c_float)
    library.ggml_get_name.restype = c_char_p
    library.llama_memory_clear.argtypes = [c_void_p, c_bool]
    library.ggml_backend_tensor_get.argtypes = [c_void_p, c_void_p, c_size_t, c_size_t]
    library.llama_model_meta_val_str.argtypes = [c_void_p, c_char_p, c_char_p, c_size_t]
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory"):
        getattr(library, name).restype = c_void_p
    handles = ("model_get_vocab", "get_memory", "get_logits", "vocab_n_tokens", "free", "model_free")
    for name in ("ggml_get_name", *(f"llama_{handle}" for handle in handles)):
        getattr(library, name).argtypes = [c_void_p]
    return library


if __name__ == "__main__":
    observe(Request.load(Path(sys.argv[1]))).save(Path(sys.argv[2]))
