"""What a family answers: how its config.json reads in our words, and where each bundle tensor comes from.

A bundle tensor is a run of rows of checkpoint tensors, one after another (`Rows`). That covers fusing (q, k and v; gate
and up), cutting one expert out of a stacked tensor, and re-ordering rows; so every file can be written in one pass with
a buffer of a few MiB, whatever the size of the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from runtime.config import ModelConfig


@dataclass(frozen=True)
class Rows:
    """`count` rows of checkpoint tensor `name` from row `first` on; None: all.

    A row is the last dimension: [E, 2I, H] has E * 2I rows. A vector has one row per value. `shape` is what the
    checkpoint must have.
    """

    name: str
    shape: tuple[int, ...]
    first: int = 0
    count: int | None = None


Sources = dict[str, tuple[Rows, ...]]


class Family(ABC):
    """The arrangement that the Llama lineage shares; a family overrides `parse` and what differs.

    `experts_at` are the names of an expert's gate, up and down below its own prefix, `moe` the module that holds gate
    and experts.
    """

    model_type = ""
    moe = "mlp"
    experts_at = ("gate_proj", "up_proj", "down_proj")
    shared_at = "mlp.shared_expert"
    shared_gate_at = "mlp.shared_expert_gate"
    # Classes that an auto_map may name: a checkpoint's own code, of which the family computes the same.
    code: frozenset[str] = frozenset()
    # Buffers that old transformers versions saved; they follow from the config.
    ignored_suffixes = ("rotary_emb.inv_freq",)

    @abstractmethod
    def parse(self, raw: dict[str, Any]) -> ModelConfig:
        """config.json in our own words. Raises CheckpointError naming the option that is not supported."""

    def embed(self, config: ModelConfig) -> Sources:
        """Tensors of dense/embed.safetensors."""
        return {"embed": (Rows("model.embed_tokens.weight", (config.vocab_size, config.hidden_size)),)}

    def head(self, config: ModelConfig) -> Sources:
        """Tensors of dense/head.safetensors."""
        sources: Sources = {"norm": (Rows("model.norm.weight", (config.hidden_size,)),)}
        if not config.tied_embeddings:
            sources["head"] = (Rows("lm_head.weight", (config.vocab_size, config.hidden_size)),)
        return sources

    def layer(self, config: ModelConfig, layer: int) -> Sources:
        """Tensors of one layer's dense file."""
        at, hidden = f"model.layers.{layer}.", config.hidden_size
        sources: Sources = {
            "attn_norm": (Rows(at + "input_layernorm.weight", (hidden,)),),
            "ffn_norm": (Rows(at + "post_attention_layernorm.weight", (hidden,)),),
        }
        sources |= self.attention(config, at + "self_attn.")
        is_moe = layer in config.moe_layers
        inner = config.mlp_size(layer)
        if inner:
            mlp = at + (self.shared_at if is_moe else "mlp") + "."
            up_shape, down_shape = (inner, hidden), (hidden, inner)
            sources["mlp.gate_up"] = (
                Rows(mlp + "gate_proj.weight", up_shape),
                Rows(mlp + "up_proj.weight", up_shape),
            )
            sources["mlp.down"] = (Rows(mlp + "down_proj.weight", down_shape),)
        if inner and is_moe and config.shared_gate:
            sources["mlp.router"] = (Rows(at + self.shared_gate_at + ".weight", (1, hidden)),)
        return sources

    def attention(self, config: ModelConfig, at: str) -> Sources:
        """q, k, v, o with their biases and norms, below the prefix `at`."""
        a, hidden = config.attention, config.hidden_size
        out = {"q": a.num_heads * a.head_dim, "k": a.num_kv_heads * a.head_dim, "v": a.num_kv_heads * a.v_head_dim}
        sources: Sources = {"qkv": tuple(Rows(f"{at}{n}_proj.weight", (rows, hidden)) for n, rows in out.items())}
        if a.qkv_bias:
            sources["qkv_bias"] = tuple(Rows(f"{at}{n}_proj.bias", (rows,)) for n, rows in out.items())
        if a.qk_norm != "none":
            for n in ("q", "k"):
                size = a.head_dim if a.qk_norm == "head" else out[n]
                sources[f"{n}_norm"] = (Rows(f"{at}{n}_norm.weight", (size,)),)
        sources["o"] = (Rows(at + "o_proj.weight", (hidden, a.num_heads * a.v_head_dim)),)
        if a.o_bias:
            sources["o_bias"] = (Rows(at + "o_proj.bias", (hidden,)),)
        return sources

    def router(self, config: ModelConfig, layer: int, names: Container[str]) -> Sources:
        """Tensors of the base router that belong to one layer."""
        shape = (config.router.num_experts, config.hidden_size)
        module = self.moe_module(layer, names)
        return {f"layer_{layer:02d}.weight": (Rows(f"{module}gate.weight", shape),)}

    def expert(self, config: ModelConfig, layer: int, expert: int, names: Container[str]) -> tuple[Rows, ...]:
        """gate, up and down of one expert, from a tensor each or from the stacked tensors of transformers 5."""
        inner, hidden = config.expert_intermediate_size, config.hidden_size
        at = f"{self.moe_module(layer, names)}experts."
        if at + "gate_up_proj" in names:
            return cut_out(config, expert, at + "gate_up_proj", at + "down_proj")
        gate, up, down = (f"{at}{expert}.{name}.weight" for name in self.experts_at)
        return Rows(gate, (inner, hidden)), Rows(up, (inner, hidden)), Rows(down, (hidden, inner))

    def extras(self, config: ModelConfig, names: Container[str]) -> dict[str, str]:
        """Prefixes of weights that take no part in the model's logits and are left out, with what they are."""
        return {}

    def moe_module(self, layer: int, names: Container[str]) -> str:
        """Prefix of the module with gate and experts; transformers 5 calls it "mlp" in every family."""
        stacked = f"model.layers.{layer}.mlp."
        if stacked + "experts.gate_up_proj" in names:
            return stacked
        return f"model.layers.{layer}.{self.moe}."


def cut_out(config: ModelConfig, expert: int, gate_up: str, down: str) -> tuple[Rows, Rows]:
    """One expert's rows of the stacked tensors `gate_up` [E, 2I, H] and `down` [E, H, I]."""
    experts, inner, hidden = config.router.num_experts, config.expert_intermediate_size, config.hidden_size
    return (
        Rows(gate_up, (experts, 2 * inner, hidden), expert * 2 * inner, 2 * inner),
        Rows(down, (experts, hidden, inner), expert * hidden, hidden),
    )
