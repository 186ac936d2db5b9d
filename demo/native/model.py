"""The model as it is trained: Qwen2-MoE's arithmetic with all experts of a layer in three tensors, so that a training
step is a few large products. `state` and `config` give what transformers and `edge export` read.

Shapes: B batch, T time, N = B * T tokens, H hidden, E experts, K chosen ones, I intermediate of an expert, S of the
shared expert, A attention heads, D head size, V vocabulary. Linear weights are [out, in], experts' [E, out, in].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROWS = 32


@dataclass(frozen=True)
class NativeConfig:
    """Sizes of the twin. An expert is 3 * hidden * intermediate weights: 36,864 bytes in fp16, nine pages."""

    vocab_size: int = 2048
    hidden: int = 192
    layers: int = 6
    heads: int = 3
    experts: int = 32
    top_k: int = 4
    intermediate: int = 32
    shared_intermediate: int = 128
    context: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6


class Attention(nn.Module):
    """Causal self-attention with rotary positions and biases on q, k and v, as Qwen2 has it."""

    def __init__(self, c: NativeConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.hidden, c.hidden) for _ in range(3))
        self.o_proj = nn.Linear(c.hidden, c.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, H], cos and sin [T, D] -> [B, T, H]."""
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class MixtureOfExperts(nn.Module):
    """Top-K of E experts with weights that sum to 1, and a shared expert behind a sigmoid gate.

    After `forward`, `balance` is the load-balancing loss of Switch Transformers (1 for an even load),
    `router_z` the squared log-partition of the router (ST-MoE) and `chosen` [N, K] the experts taken.
    """

    def __init__(self, c: NativeConfig) -> None:
        super().__init__()
        self.top_k = c.top_k
        self.gate = nn.Parameter(torch.empty(c.experts, c.hidden))
        self.gate_up = nn.Parameter(torch.empty(c.experts, 2 * c.intermediate, c.hidden))
        self.down = nn.Parameter(torch.empty(c.experts, c.hidden, c.intermediate))
        self.shared_gate_up = nn.Linear(c.hidden, 2 * c.shared_intermediate, bias=False)
        self.shared_down = nn.Linear(c.shared_intermediate, c.hidden, bias=False)
        self.shared_gate = nn.Linear(c.hidden, 1, bias=False)
        self.balance = self.router_z = self.chosen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, H] -> [B, T, H]."""
        rows = x.flatten(0, 1)
        logits = F.linear(rows, self.gate)
        probabilities = logits.softmax(-1)
        weights, self.chosen = probabilities.topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        load = torch.bincount(self.chosen.flatten(), minlength=len(self.gate)) / self.chosen.numel()
        self.balance = len(self.gate) * (probabilities.mean(0) * load).sum()
        self.router_z = logits.logsumexp(-1).square().mean()
        shared = self.shared_down(_swiglu(self.shared_gate_up(rows))) * torch.sigmoid(self.shared_gate(rows))
        return (self._experts(rows, weights) + shared).view(x.shape)  # type: ignore[no-any-return]

    def _experts(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Sorts the N * K pairs of token and expert by expert; each expert multiplies its rows.

        Rows per expert are padded to a multiple of _ROWS: CPU libraries prepare a product anew for each new shape.
        """
        flat = self.chosen.flatten()
        order = flat.argsort(stable=True)
        chosen, tokens = flat[order], order // self.top_k
        counts = torch.bincount(flat, minlength=len(self.gate))
        padded = (counts + _ROWS - 1) // _ROWS * _ROWS
        shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
        slots = torch.arange(len(flat), device=flat.device) + shift[chosen]
        gathered = rows.new_zeros(int(padded.sum()), rows.shape[1]).index_copy(0, slots, rows[tokens])
        parts = zip(gathered.split(padded.tolist()), self.gate_up.unbind(), self.down.unbind(), strict=True)
        out = torch.cat([F.linear(_swiglu(F.linear(part, gate_up)), down) for part, gate_up, down in parts])[slots]
        weighted = out * weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(rows).index_add(0, tokens, weighted)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class Layer(nn.Module):
    """Attention and experts, each behind a norm and added to the stream."""

    def __init__(self, c: NativeConfig) -> None:
        super().__init__()
        self.input_norm, self.post_norm = nn.RMSNorm(c.hidden, c.norm_eps), nn.RMSNorm(c.hidden, c.norm_eps)
        self.attention, self.moe = Attention(c), MixtureOfExperts(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, H] -> [B, T, H]."""
        x = x + self.attention(self.input_norm(x), cos, sin)
        return x + self.moe(self.post_norm(x))  # type: ignore[no-any-return]


class NativeModel(nn.Module):
    """The whole model; embedding and output head are one matrix."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, config.norm_eps)
        head = config.hidden // config.heads
        frequencies = 1 / config.rope_theta ** (torch.arange(0, head, 2) / head)
        angles = torch.outer(torch.arange(config.context), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]."""
        length = tokens.shape[1]
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])  # type: ignore[index]
        return F.linear(self.norm(x), self.embedding.weight)

    def mixtures(self) -> list[MixtureOfExperts]:
        """The layers' mixtures, in order."""
        return [layer.moe for layer in self.layers]  # type: ignore[misc, union-attr]


def hub_config(c: NativeConfig, end_of_text: int) -> dict[str, Any]:
    """config.json of the Hugging Face Qwen2-MoE layout."""
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "dtype": "bfloat16",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden,
        "intermediate_size": c.shared_intermediate,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.heads,
        "num_experts": c.experts,
        "num_experts_per_tok": c.top_k,
        "norm_topk_prob": True,
        "moe_intermediate_size": c.intermediate,
        "shared_expert_intermediate_size": c.shared_intermediate,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "qkv_bias": True,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.context,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
    }


def load_hub_state(model: NativeModel, state: dict[str, Tensor]) -> None:
    """The inverse of `hub_state`. Raises KeyError or RuntimeError for the weights of another model."""
    own = dict(model.named_parameters())
    for prefix, layer in ((f"model.layers.{index}.", f"layers.{index}.") for index in range(model.config.layers)):
        mlp = f"{prefix}mlp."
        experts = [f"{mlp}experts.{expert}." for expert in range(model.config.experts)]
        gate_up = [torch.cat([state[f"{e}gate_proj.weight"], state[f"{e}up_proj.weight"]]) for e in experts]
        shared = [state[f"{mlp}shared_expert.{part}_proj.weight"] for part in ("gate", "up")]
        values = {f"attention.{name}": state[f"{prefix}self_attn.{name}"] for name in _attention_names(model)}
        values |= {
            "input_norm.weight": state[f"{prefix}input_layernorm.weight"],
            "post_norm.weight": state[f"{prefix}post_attention_layernorm.weight"],
            "moe.gate": state[f"{mlp}gate.weight"],
            "moe.gate_up": torch.stack(gate_up),
            "moe.down": torch.stack([state[f"{e}down_proj.weight"] for e in experts]),
            "moe.shared_gate_up.weight": torch.cat(shared),
            "moe.shared_down.weight": state[f"{mlp}shared_expert.down_proj.weight"],
            "moe.shared_gate.weight": state[f"{mlp}shared_expert_gate.weight"],
        }
        for name, value in values.items():
            own[layer + name].data.copy_(value)
    own["embedding.weight"].data.copy_(state["model.embed_tokens.weight"])
    own["norm.weight"].data.copy_(state["model.norm.weight"])


def _attention_names(model: NativeModel) -> list[str]:
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    return [name for name, _ in layer.attention.named_parameters()]


def hub_state(model: NativeModel) -> dict[str, Tensor]:
    """Weights in bf16 under the names of the Qwen2-MoE layout, one tensor per expert and projection."""
    state = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        names: dict[str, Tensor] = {
            "input_layernorm": layer.input_norm.weight,
            "post_attention_layernorm": layer.post_norm.weight,
            **{f"self_attn.{name}": value for name, value in layer.attention.named_parameters()},
            **_mixture_state(layer.moe),
        }
        for name, value in names.items():
            suffix = "" if name.endswith((".weight", ".bias")) else ".weight"
            state[f"model.layers.{index}.{name}{suffix}"] = value
    return {name: value.detach().to(torch.bfloat16).cpu().contiguous().clone() for name, value in state.items()}


def _mixture_state(moe: MixtureOfExperts) -> dict[str, Tensor]:
    gate, up = moe.shared_gate_up.weight.chunk(2)
    names: dict[str, Tensor] = {
        "mlp.gate": moe.gate,
        "mlp.shared_expert_gate": moe.shared_gate.weight,
        "mlp.shared_expert.gate_proj": gate,
        "mlp.shared_expert.up_proj": up,
        "mlp.shared_expert.down_proj": moe.shared_down.weight,
    }
    for expert, (gate_up, down) in enumerate(zip(moe.gate_up, moe.down, strict=True)):
        gate, up = gate_up.chunk(2)
        for name, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            names[f"mlp.experts.{expert}.{name}"] = value
    return names
