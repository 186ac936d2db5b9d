"""The dense parts of a model as ONNX graphs: block (attention), mlp, head, and one expert with weights as inputs.

Shapes as in runtime/config.py; D is a head's size, G the queries that share one key head. Decomposed ops only, see
docs/onnx-operators.md. The residual stream, norms, rope, activations and softmax are fp32, GEMMs have the compute
dtype. The stored weights are fp16: the fp32 graphs cast them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from export.attention import Inputs, gqa, mla
from export.graph import FP16, FP32, Graph, Locate
from export.maths import add_residual, gated, linear, rms_norm, scaled, stored
from runtime.config import ModelConfig
from runtime.errors import UsageError
from runtime.layout import EMBED_FILE, HEAD_FILE, graph_file, layer_file

COMPUTE_TYPES = {"fp16": FP16, "fp32": FP32}


def build_graphs(config: ModelConfig, dtype: str, locate: Locate) -> Iterator[tuple[str, bytes]]:
    """Yield (bundle path, serialized ModelProto) of every part of the model for one compute dtype.

    `locate(file, tensor)` gives the byte offset and length of a tensor in a bundle file.
    Raises UsageError for an unknown dtype or an attention that has no graph.
    """
    if dtype not in COMPUTE_TYPES:
        raise UsageError(f"no ONNX graphs for dtype {dtype!r} (known: {', '.join(COMPUTE_TYPES)})")
    for part, fill in _parts(config):
        graph = Graph(part, COMPUTE_TYPES[dtype], locate)
        fill(graph)
        yield graph_file(part, dtype), graph.build()


def _parts(config: ModelConfig) -> Iterator[tuple[str, Callable[[Graph], None]]]:
    for layer in range(config.num_layers):
        yield f"layer_{layer:02d}", partial(block, config=config, layer=layer)
        if config.mlp_size(layer):
            yield f"mlp_{layer:02d}", partial(mlp, config=config, layer=layer)
    yield "head", partial(head, config=config)
    yield "expert", partial(expert, config=config)


def block(g: Graph, config: ModelConfig, layer: int) -> None:
    """x, cos, sin, mask, past_k, past_v -> x_attn, h, k_new, v_new.

    x [S, H], cos and sin [S, rope dim], mask [S, T + S] (added to the scores: 0 or -inf) are fp32; past rows [T, ...]
    and new rows [S, ...] have the compute dtype and the shapes of config.attention.cache_rows. T is at least 1: with an
    empty cache give one row that the mask hides, as any padding of the past.
    """
    file, hidden, a = layer_file(layer), config.hidden_size, config.attention
    key_row, value_row = a.cache_rows
    x = g.input("x", FP32, ["S", hidden])
    cos = g.input("cos", FP32, ["S", config.rope.dim])
    sin = g.input("sin", FP32, ["S", config.rope.dim])
    mask = g.input("mask", FP32, ["S", "T + S"])
    past_k = g.input("past_k", g.compute, ["T", *key_row])
    past_v = g.input("past_v", g.compute, ["T", *value_row])

    normed = g.cast(rms_norm(g, x, file, "attn_norm", hidden, config.norm_eps), g.compute)
    attend = {"gqa": gqa, "mla": mla}[a.kind]
    mixed, k_new, v_new = attend(g, config, file, Inputs(normed, cos, sin, mask, past_k, past_v))
    attended = linear(g, mixed, file, "o", (hidden, a.num_heads * a.v_head_dim), "o_bias" if a.o_bias else None)
    x_attn = add_residual(g, x, attended, config.residual_scale)
    h = g.cast(rms_norm(g, x_attn, file, "ffn_norm", hidden, config.norm_eps), g.compute)

    g.output("x_attn", x_attn, FP32, ["S", hidden])
    g.output("h", h, g.compute, ["S", hidden])
    g.output("k_new", k_new, g.compute, ["S", *key_row])
    g.output("v_new", v_new, g.compute, ["S", *value_row])


def mlp(g: Graph, config: ModelConfig, layer: int) -> None:
    """h [S, H] -> out [S, H] fp32: shared experts (times sigmoid(w . h) where gated), or the MLP of a dense layer."""
    file, hidden, inner = layer_file(layer), config.hidden_size, config.mlp_size(layer)
    h = g.input("h", g.compute, ["S", hidden])
    both = linear(g, h, file, "mlp.gate_up", (2 * inner, hidden))
    gate, up = g.ops("Split", 2, both, g.const([inner, inner]), axis=1)
    out = gated(g, gate, up, stored(g, file, "mlp.down", (hidden, inner), g.compute), config.activation)
    if config.shared_gate and layer in config.moe_layers:
        logit = linear(g, h, file, "mlp.router", (1, hidden))
        out = g.op("Mul", out, g.op("Sigmoid", g.cast(logit, FP32)))
    g.output("out", out, FP32, ["S", hidden])


def head(g: Graph, config: ModelConfig) -> None:
    """x [S, H] fp32 -> logits [S, V] fp32."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    x = g.input("x", FP32, ["S", hidden])
    normed = g.cast(rms_norm(g, x, HEAD_FILE, "norm", hidden, config.norm_eps), g.compute)
    file, tensor = (EMBED_FILE, "embed") if config.tied_embeddings else (HEAD_FILE, "head")
    logits = g.cast(linear(g, normed, file, tensor, (vocabulary, hidden)), FP32)
    g.output("logits", scaled(g, logits, config.logits_scale), FP32, ["S", vocabulary])


def expert(g: Graph, config: ModelConfig) -> None:
    """h [n, H], and the fp16 tensors of one blob, gate and up [I, H], down [H, I] -> y [n, H] fp32."""
    h = g.input("h", g.compute, ["n", config.hidden_size])
    blob = [g.input(name, FP16, shape) for name, shape in config.expert_shapes.items()]
    gate, up, down = (weight if g.compute == FP16 else g.cast(weight, g.compute) for weight in blob)
    gate, up = (g.op("Gemm", h, weight, transB=1) for weight in (gate, up))
    g.output("y", gated(g, gate, up, down, config.activation), FP32, ["n", config.hidden_size])
