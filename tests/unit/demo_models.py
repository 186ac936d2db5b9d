"""A dense llama of a few thousand weights as a GGUF file, quantised as the demo's source is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS = 2, 64, 128, 4, 2
HEAD = HIDDEN // HEADS
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@dataclass(frozen=True)
class TinyModel:
    """The file, and the weights that dequantising it must give, under their Hugging Face names."""

    path: Path
    weights: dict[str, npt.NDArray[np.float32]]
    tokens: list[str]


def write_tiny_gguf(path: Path, seed: int = 0) -> TinyModel:
    """Random weights; embedding in Q8_0, linear weights in Q4_1, norms in F32."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    random, tokens = np.random.RandomState(seed), _tokens()
    writer = gguf.GGUFWriter(path, "llama")
    _metadata(writer, tokens)
    weights: dict[str, npt.NDArray[np.float32]] = {}

    def add(name: str, hub_name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, heads: int = 0) -> None:
        values = random.standard_normal(shape).astype(np.float32) * np.float32(0.2)
        if kind == kinds.F32:
            values += 1
        packed = gguf.quants.quantize(values, kind)
        stored = gguf.quants.dequantize(packed, kind)
        weights[hub_name] = rows_in_rotate_half_order(stored, heads) if heads else stored
        writer.add_tensor(name, packed, raw_dtype=kind)

    add("token_embd.weight", "model.embed_tokens.weight", (len(tokens), HIDDEN), kinds.Q8_0)
    for layer in range(LAYERS):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        add(theirs + "attn_norm.weight", ours + "input_layernorm.weight", (HIDDEN,), kinds.F32)
        add(theirs + "ffn_norm.weight", ours + "post_attention_layernorm.weight", (HIDDEN,), kinds.F32)
        for part, rows, heads in (("q", HEADS, HEADS), ("k", KV_HEADS, KV_HEADS), ("v", KV_HEADS, 0)):
            shape = (rows * HEAD, HIDDEN)
            add(f"{theirs}attn_{part}.weight", f"{ours}self_attn.{part}_proj.weight", shape, kinds.Q4_1, heads)
        add(theirs + "attn_output.weight", ours + "self_attn.o_proj.weight", (HIDDEN, HIDDEN), kinds.Q4_1)
        for part, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            add(f"{theirs}ffn_{part}.weight", f"{ours}mlp.{part}_proj.weight", shape, kinds.Q4_1)
    add("output_norm.weight", "model.norm.weight", (HIDDEN,), kinds.F32)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return TinyModel(path, weights, tokens)


def rows_in_rotate_half_order(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Row by row: pair i of a head lies in rows 2i, 2i + 1 of the file and belongs into rows i, i + D/2."""
    size = len(weight) // heads
    result = np.empty_like(weight)
    for head in range(heads):
        for pair in range(size // 2):
            result[head * size + pair] = weight[head * size + 2 * pair]
            result[head * size + size // 2 + pair] = weight[head * size + 2 * pair + 1]
    return result


def _tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return SPECIAL + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]


def _metadata(writer, tokens: list[str]) -> None:  # type: ignore[no-untyped-def]
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
