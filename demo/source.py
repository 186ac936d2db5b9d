"""The dense model as it comes: a llama-architecture GGUF file, read without transformers and without pickle.

Shapes: V vocabulary, H hidden, I intermediate, N query heads, K key heads, D head size. Linear weights are [out, in].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFReader

Array = npt.NDArray[np.float32]

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class DenseConfig:
    """Sizes of the dense model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_context: int
    rope_theta: float
    norm_eps: float


@dataclass(frozen=True)
class TokenizerData:
    """What the GGUF file says about its tokenizer. `merges` are "left right" pairs in order of rank."""

    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    pre_tokenizer: str
    bos_id: int
    eos_id: int
    unknown_id: int
    padding_id: int
    chat_template: str


class DenseSource:
    """Dequantised tensors of a llama GGUF file, one at a time, under their Hugging Face names."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._reader: GGUFReader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"{path}: general.architecture is {architecture!r}, expected 'llama'")
        self.config = self._config()

    def layer(self, layer: int, name: str) -> Array:
        """One tensor of a layer by its Hugging Face name, e.g. "self_attn.q_proj"; q and k in rotate-half order."""
        weight = self._dequantised(f"blk.{layer}.{LAYER_NAMES[name]}.weight")
        if name == "self_attn.q_proj":
            return unpermute(weight, self.config.num_heads)
        if name == "self_attn.k_proj":
            return unpermute(weight, self.config.num_kv_heads)
        return weight

    def embedding(self) -> Array:
        """Token embedding [V, H], which is the output projection as well."""
        return self._dequantised("token_embd.weight")

    def final_norm(self) -> Array:
        """Weight of the last norm [H]."""
        return self._dequantised("output_norm.weight")

    def tokenizer(self) -> TokenizerData:
        """The byte-level BPE of the file."""
        key = "tokenizer.ggml."
        if self._field(key + "model") != "gpt2":
            raise CheckpointError(f"{key}model is {self._field(key + 'model')!r}, expected 'gpt2' (byte-level BPE)")
        return TokenizerData(
            tokens=self._field(key + "tokens"),
            token_types=self._field(key + "token_type"),
            merges=self._field(key + "merges"),
            pre_tokenizer=self._field(key + "pre"),
            bos_id=self._field(key + "bos_token_id"),
            eos_id=self._field(key + "eos_token_id"),
            unknown_id=self._field(key + "unknown_token_id"),
            padding_id=self._field(key + "padding_token_id"),
            chat_template=self._field("tokenizer.chat_template"),
        )

    def _config(self) -> DenseConfig:
        if "output.weight" in self._tensors:
            raise CheckpointError("output.weight: this recipe expects a model with tied embeddings")
        return DenseConfig(
            vocab_size=int(self._tensor("token_embd.weight").shape[1]),
            hidden_size=self._field("llama.embedding_length"),
            intermediate_size=self._field("llama.feed_forward_length"),
            num_layers=self._field("llama.block_count"),
            num_heads=self._field("llama.attention.head_count"),
            num_kv_heads=self._field("llama.attention.head_count_kv"),
            max_context=self._field("llama.context_length"),
            rope_theta=self._field("llama.rope.freq_base"),
            # stored as fp32: 1e-5 comes back as 9.99999974e-06, which is 1e-5 again at fp32's 7 digits
            norm_eps=float(f"{self._field('llama.attention.layer_norm_rms_epsilon'):.7g}"),
        )

    def _field(self, name: str) -> Any:
        field = self._reader.get_field(name)
        if field is None:
            raise CheckpointError(f"{name}: missing in the GGUF metadata")
        return field.contents()

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise CheckpointError(f"{name}: missing in the GGUF file")
        return self._tensors[name]

    def _dequantised(self, name: str) -> Array:
        from gguf.quants import dequantize

        tensor = self._tensor(name)
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)


def unpermute(weight: Array, heads: int) -> Array:
    """Rows of q or k from llama.cpp's interleaved rope order (pairs 2i, 2i+1) to rotate-half (pairs i, i + D/2).

    `weight` is [heads * D, H].
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
