"""What a tuning run takes: memory, work per token, hours. Arithmetic on the model's shapes; nothing is loaded.

    forward  = products of the dense blocks, K experts, the router and the head (2 per weight), and attention over S
    step     = forward + backward for the inputs (as much again from the second layer with experts on, for weights are
               frozen and the first gate ends it; attention twice) + gradient of the gates
               [+ forward again, with gradient checkpointing] [+ forward, for a teacher that is not kept]
    memory   = frozen weights + gates (weight, stock copy, gradient, two moments) + activations + one chunk of logits

Shapes: H hidden size, S sequence length. Attention counts all S keys of a token: how much of the upper half a kernel
skips differs, so long sequences are overestimated.
"""

from __future__ import annotations

from dataclasses import dataclass

from remoe.tune_options import TuneOptions
from runtime.config import ModelConfig
from runtime.layout import embed_tensors, head_tensors, layer_tensors

_CHUNK_TOKENS = 128  # of remoe/head.py
_GATE_BYTES = 5 * 4


@dataclass(frozen=True)
class TunePlan:
    """Sizes in bytes, work in floating-point operations per token."""

    weight_bytes: int
    gate_bytes: int
    activation_bytes: int
    head_bytes: int
    gate_parameters: int
    forward_flops: int
    step_flops: int
    tokens: int

    @property
    def memory_bytes(self) -> int:
        """All of it, without what the allocator keeps for itself."""
        return self.weight_bytes + self.gate_bytes + self.activation_bytes + self.head_bytes

    def seconds(self, flops_per_s: float) -> float:
        """The whole run at a sustained rate."""
        return self.tokens * self.step_flops / flops_per_s


def plan(config: ModelConfig, options: TuneOptions, length: int, item_bytes: int) -> TunePlan:
    """For sequences of `length` tokens and frozen weights of `item_bytes` each."""
    work = [forward_flops_of_layer(config, n, length) for n in range(config.num_layers)]
    # transformers' checkpointing has the gradient go down to the embedding.
    above = range(0 if options.gradient_checkpointing else config.moe_layers[0] + 1, config.num_layers)
    layers, attention = sum(work), attention_flops(config, length)
    head = 2 * config.vocab_size * config.hidden_size
    share = options.head_share if options.objective.needs_model else 0.0
    gates = len(config.moe_layers) * config.router.num_experts * config.hidden_size
    forward = layers + round(share * head)
    backward = sum(work[n] + attention for n in above) + round(share * head) + 2 * gates
    again = layers if options.gradient_checkpointing else 0
    teacher = layers + round(share * head) if options.objective.lm_kl else 0
    tokens = options.micro_batch * length
    return TunePlan(
        weight_bytes=item_bytes * _parameters(config),
        gate_bytes=_GATE_BYTES * gates,
        activation_bytes=tokens * item_bytes * _kept_values(config, options.gradient_checkpointing),
        head_bytes=_CHUNK_TOKENS * config.vocab_size * 4 * (6 if options.objective.lm_kl else 4),
        gate_parameters=gates,
        forward_flops=forward,
        step_flops=forward + backward + again + teacher,
        tokens=options.steps * options.batch * length,
    )


def forward_flops_of_layer(config: ModelConfig, layer: int, length: int) -> int:
    """Operations of one token in one layer."""
    tensors = layer_tensors(config, layer)
    weights = sum(rows[0] * rows[1] for name, rows in tensors.items() if len(rows) == 2)
    weights += sum(a * b * c for a, b, c in (rows for rows in tensors.values() if len(rows) == 3))
    if layer in config.moe_layers:
        router = config.router
        expert = sum(a * b for a, b in config.expert_shapes.values())
        weights += router.num_experts * config.hidden_size + router.top_k * expert
    return 2 * weights + attention_flops(config, length)


def attention_flops(config: ModelConfig, length: int) -> int:
    """Scores and their sum over `length` keys, for one token of one layer."""
    a = config.attention
    key = a.head_dim + (a.rope_head_dim if a.kind == "mla" else 0)
    return 2 * length * a.num_heads * (key + a.v_head_dim)


def _parameters(config: ModelConfig) -> int:
    dense = [*embed_tensors(config).values(), *head_tensors(config).values()]
    for layer in range(config.num_layers):
        dense += layer_tensors(config, layer).values()
    expert = sum(a * b for a, b in config.expert_shapes.values())
    return sum(_size(shape) for shape in dense) + len(config.moe_layers) * config.router.num_experts * expert


def _kept_values(config: ModelConfig, checkpointing: bool) -> int:
    """Values per token that the backward pass needs: of every layer, or one layer and the inputs of all."""
    a, hidden = config.attention, config.hidden_size
    attention = 4 * hidden + 3 * a.num_heads * (a.head_dim + a.v_head_dim)
    router = config.router
    experts = router.top_k * (2 * hidden + 5 * config.expert_intermediate_size) + 2 * hidden
    shared = 4 * max(config.shared_intermediate_size, config.dense_intermediate_size)
    layer = attention + experts + shared + 4 * router.num_experts
    return layer + config.num_layers * hidden if checkpointing else config.num_layers * layer


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
