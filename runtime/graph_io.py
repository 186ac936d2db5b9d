"""What goes into and out of each ONNX graph of a bundle, told from the config alone.

The engine builder takes its shape ranges from here and the TensorRT back-end its bindings, so neither has to trust or
parse a graph; tests compare it with the graphs that export/blocks.py writes. Dimensions as in runtime/config.py: S, T,
"T + S", and n for the tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from runtime.config import ModelConfig
from runtime.layout import EMBED_FILE, HEAD_FILE, layer_file

BLOCK_TOKENS = 512  # the most tokens that the decoder gives to a block at once, so what an engine is built for
Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class TensorIO:
    """One input or output: `dtype` "fp16" or "fp32"; a str in `dims` names a dynamic dimension."""

    name: str
    dtype: str
    dims: Dims

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where `sizes` gives the dynamic dimensions S, T and n."""
        known = {**sizes, "T + S": sizes.get("T", 0) + sizes.get("S", 0)}
        return tuple(known[dim] if isinstance(dim, str) else dim for dim in self.dims)


@dataclass(frozen=True)
class PartIO:
    """Inputs and outputs of one graph, in the graph's order."""

    inputs: tuple[TensorIO, ...]
    outputs: tuple[TensorIO, ...]


def block_part(layer: int) -> str:
    """The attention part of a layer."""
    return f"layer_{layer:02d}"


def mlp_part(layer: int) -> str:
    """The shared experts, or the whole MLP, of a layer."""
    return f"mlp_{layer:02d}"


def dense_parts(config: ModelConfig) -> Iterator[str]:
    """Every part that runs once per token, in the order of a step; the expert's graph is none of them."""
    for layer in range(config.num_layers):
        yield block_part(layer)
        if config.mlp_size(layer):
            yield mlp_part(layer)
    yield "head"


def part_io(config: ModelConfig, part: str, dtype: str = "fp16") -> PartIO:
    """Inputs and outputs of a part's graph whose products have the compute dtype `dtype`."""
    kind = part.split("_")[0]
    hidden = config.hidden_size
    x, h = TensorIO("x", "fp32", ("S", hidden)), TensorIO("h", dtype, ("S", hidden))
    if kind == "layer":
        return _block_io(config, x, h, dtype)
    if kind == "mlp":
        return PartIO((h,), (TensorIO("out", "fp32", ("S", hidden)),))
    if kind == "head":
        return PartIO((x,), (TensorIO("logits", "fp32", ("S", config.vocab_size)),))
    assert part == "expert", part
    blob = tuple(TensorIO(name, "fp16", shape) for name, shape in config.expert_shapes.items())
    return PartIO((TensorIO("h", dtype, ("n", hidden)), *blob), (TensorIO("y", "fp32", ("n", hidden)),))


def weight_files(config: ModelConfig, part: str) -> tuple[str, ...]:
    """The bundle files that hold the weights of a part; none for the expert's graph, which gets them as inputs."""
    kind, _, number = part.partition("_")
    if kind in ("layer", "mlp"):
        return (layer_file(int(number)),)
    if kind == "head":
        return (HEAD_FILE, EMBED_FILE) if config.tied_embeddings else (HEAD_FILE,)
    return ()


def attention_scratch_bytes(config: ModelConfig, context: int, prefill: int) -> int:
    """What a block works in for its longest piece of a prompt: its scores [heads * S, T + S] in fp32, before and after
    the softmax. TensorRT-RTX was seen to ask for that and a few kB.
    """
    return 2 * 4 * config.attention.num_heads * prefill * (context + prefill)


def _block_io(config: ModelConfig, x: TensorIO, h: TensorIO, dtype: str) -> PartIO:
    key_row, value_row = config.attention.cache_rows
    turn = ("S", config.rope.dim)
    inputs = (
        x,
        TensorIO("cos", "fp32", turn),
        TensorIO("sin", "fp32", turn),
        TensorIO("mask", "fp32", ("S", "T + S")),
        TensorIO("past_k", dtype, ("T", *key_row)),
        TensorIO("past_v", dtype, ("T", *value_row)),
    )
    outputs = (
        TensorIO("x_attn", "fp32", x.dims),
        h,
        TensorIO("k_new", dtype, ("S", *key_row)),
        TensorIO("v_new", dtype, ("S", *value_row)),
    )
    return PartIO(inputs, outputs)
