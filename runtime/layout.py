"""The names inside a bundle: files, and the tensors of the dense safetensors files with their shapes.

Exporter, verifier and back-ends all take names and shapes from here, so there is one place where they can be wrong.
"""

from __future__ import annotations

from runtime.config import ModelConfig

PAGE_BYTES = 4096  # blobs are padded to it and the data of a dense file starts on it: O_DIRECT and mmap alignment
MANIFEST = "manifest.json"
EMBED_FILE = "dense/embed.safetensors"
HEAD_FILE = "dense/head.safetensors"
BASE_ROUTER = "routers/base.safetensors"


def layer_file(layer: int) -> str:
    """The dense weights of one layer."""
    return f"dense/layer_{layer:02d}.safetensors"


def graph_file(part: str, dtype: str) -> str:
    """The ONNX graph of one part ("layer_03", "mlp_03", "head", "expert") for one compute dtype ("fp16", "fp32").

    Graphs lie beside the weights because ONNX refuses external data outside the graph's own directory.
    """
    return f"dense/{part}.{dtype}.onnx"


def expert_file(layer: int, expert: int) -> str:
    """The blob of one expert."""
    return f"experts/layer_{layer:02d}/expert_{expert:03d}.fp16"


def expert_identity(layer: int, expert: int) -> int:
    """Seed of a blob's xxh3-64: binds the checksum to the expert, so that two swapped blobs are noticed."""
    return layer << 20 | expert


def padded(size_bytes: int) -> int:
    """`size_bytes` rounded up to whole pages."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def expert_bytes(config: ModelConfig) -> int:
    """Bytes of the fp16 values of one expert, without padding."""
    return 2 * sum(rows * columns for rows, columns in config.expert_shapes.values())


def embed_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of dense/embed.safetensors."""
    return {"embed": (config.vocab_size, config.hidden_size)}


def head_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of dense/head.safetensors; with tied embeddings the head is `embed`."""
    tensors: dict[str, tuple[int, ...]] = {"norm": (config.hidden_size,)}
    if not config.tied_embeddings:
        tensors["head"] = (config.vocab_size, config.hidden_size)
    return tensors


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer's dense file, in file order.

    Linear weights are [out, in]. `qkv` holds the rows of q, then k, then v; `mlp.gate_up` those of gate, then up.
    """
    hidden, inner = config.hidden_size, config.mlp_size(layer)
    tensors: dict[str, tuple[int, ...]] = {"attn_norm": (hidden,), **_attention_tensors(config), "ffn_norm": (hidden,)}
    if inner:
        tensors["mlp.gate_up"] = (2 * inner, hidden)
        tensors["mlp.down"] = (hidden, inner)
        if config.shared_gate and layer in config.moe_layers:
            tensors["mlp.router"] = (1, hidden)
    return tensors


def router_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors (fp32) of a router file."""
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in config.moe_layers:
        tensors[f"layer_{layer:02d}.weight"] = (config.router.num_experts, config.hidden_size)
        if config.router.choice_bias:
            tensors[f"layer_{layer:02d}.choice_bias"] = (config.router.num_experts,)
    return tensors


def _attention_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    a, hidden = config.attention, config.hidden_size
    tensors: dict[str, tuple[int, ...]] = {}
    if a.kind == "mla":
        q_out = a.num_heads * (a.head_dim + a.rope_head_dim)
        if a.q_lora_rank is None:
            tensors["q"] = (q_out, hidden)
        else:
            tensors |= {"q_a": (a.q_lora_rank, hidden), "q_a_norm": (a.q_lora_rank,), "q_b": (q_out, a.q_lora_rank)}
        tensors["kv_a"] = (a.kv_lora_rank + a.rope_head_dim, hidden)
        tensors["kv_a_norm"] = (a.kv_lora_rank,)
        tensors["k_b"] = (a.num_heads, a.head_dim, a.kv_lora_rank)
        tensors["v_b"] = (a.num_heads, a.v_head_dim, a.kv_lora_rank)
    else:
        q_out, k_out = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        total = q_out + k_out + a.num_kv_heads * a.v_head_dim
        tensors["qkv"] = (total, hidden)
        if a.qkv_bias:
            tensors["qkv_bias"] = (total,)
        if a.qk_norm != "none":
            per_head = a.qk_norm == "head"
            tensors["q_norm"] = (a.head_dim if per_head else q_out,)
            tensors["k_norm"] = (a.head_dim if per_head else k_out,)
    tensors["o"] = (hidden, a.num_heads * a.v_head_dim)
    if a.o_bias:
        tensors["o_bias"] = (hidden,)
    return tensors
