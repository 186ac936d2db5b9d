"""The gates of a transformers model, made tunable: found by shape, replaced by ours, put back afterwards.

While they are installed every MoE layer routes by runtime/router.py's rule in fp32, from gates that may be trained.
Everything else of the model is frozen. Legend: N tokens, H hidden size, E experts, K chosen, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from remoe.cache_model import Prior, choose_with_prior
from remoe.objective import Routed
from remoe.routing import choose, weigh
from runtime.config import ModelConfig, RouterConfig
from runtime.errors import CheckpointError, UsageError
from runtime.layout import router_tensors


@dataclass
class Tape:
    """What the gates of one forward pass saw and chose, in layer order. `segments` [N] are the tokens' documents."""

    segments: Tensor
    prior: Prior | None = None
    keep_hidden: bool = False
    recording: bool = True
    logits: list[Tensor] = field(default_factory=list)
    reference: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)


class Gate(nn.Module):
    """One tunable gate. `weight` [E, H] fp32 is trained, `reference` is the frozen stock gate, `bias` [E] or None."""

    reference: Tensor
    bias: Tensor | None

    def __init__(self, config: RouterConfig, stock: nn.Module, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        weight, bias = _tensor(stock, "weight"), None
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("reference", weight, persistent=False)
        if config.choice_bias:
            bias = _tensor(stock, "e_score_correction_bias")
        self.register_buffer("bias", bias, persistent=False)
        self.experts_first = _experts_first(stock, weight.shape[1])
        self.tape: Tape | None = None
        self.stock = False  # route by the frozen gate

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [..., H] to gate logits [N, E], weights [N, K] and experts [N, K], in the order of the gate it replaces."""
        h = hidden_states.reshape(-1, hidden_states.shape[-1])
        with torch.autocast(h.device.type, enabled=False):
            wide = h.float()
            logits = nn.functional.linear(wide, self.reference if self.stock else self.weight)
            experts = self._choose(logits)
            weights = self._weigh(logits, experts)
            tape = self.tape
            if tape is not None and tape.recording:
                self._record(tape, wide, logits, experts)
        if self.experts_first:
            return experts, weights.to(h.dtype), logits
        return logits, weights.to(h.dtype), experts

    def _choose(self, logits: Tensor) -> Tensor:
        tape = self.tape
        if tape is None or tape.prior is None:
            return choose(self.config, logits, self.bias)
        return choose_with_prior(self.config, logits.detach(), self.bias, tape.segments, tape.prior)

    def _weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        weights = weigh(self.config, logits, experts)
        prior = self.tape.prior if self.tape is not None else None
        if prior is None or not prior.options.keeps_sum(self.config):
            return weights
        own = weigh(self.config, logits, choose(self.config, logits, self.bias)).sum(-1, keepdim=True)
        return weights * (own / (weights.sum(-1, keepdim=True) + 1e-20))

    def _record(self, tape: Tape, h: Tensor, logits: Tensor, experts: Tensor) -> None:
        with torch.no_grad():
            tape.reference.append(nn.functional.linear(h, self.reference))
        tape.logits.append(logits)
        tape.experts.append(experts)
        if tape.keep_hidden:
            tape.hidden.append(h.detach())


class Gates:
    """Every gate of a model. Use `with gates.installed():` around training and evaluation."""

    def __init__(self, model: Any, config: ModelConfig) -> None:
        """Find the gates. Raises CheckpointError when the model is not the one of `config`."""
        self.model, self.config = model, config
        self._places = [find_gate(model, config, layer) for layer in config.moe_layers]
        device = next(model.parameters()).device
        self.modules = [
            Gate(config.router, getattr(parent, name), layer).to(device)
            for (parent, name), layer in zip(self._places, config.moe_layers, strict=True)
        ]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model routes with these gates, and nothing but their weights has a gradient. Leaves it as it was."""
        wanted = [(p, p.requires_grad) for p in self.model.parameters()]
        stock = [getattr(parent, name) for parent, name in self._places]
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        for (parent, name), gate in zip(self._places, self.modules, strict=True):
            setattr(parent, name, gate)
        try:
            yield
        finally:
            for (parent, name), module in zip(self._places, stock, strict=True):
                setattr(parent, name, module)
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)

    @contextmanager
    def recorded(self, tape: Tape) -> Iterator[Tape]:
        """Forward passes inside write on `tape`; recomputing a checkpointed layer in the backward pass does not."""
        for gate in self.modules:
            gate.tape = tape
        try:
            yield tape
        finally:
            tape.recording = False  # but it stays: a recomputed layer must choose again as it did

    def forget(self) -> None:
        """Take the last tape away: the backward pass is over."""
        for gate in self.modules:
            gate.tape = None

    @contextmanager
    def as_stock(self) -> Iterator[None]:
        """Forward passes inside route by the frozen gates, without a prior."""
        tapes = [gate.tape for gate in self.modules]
        for gate in self.modules:
            gate.stock, gate.tape = True, None
        try:
            yield
        finally:
            for gate, tape in zip(self.modules, tapes, strict=True):
                gate.stock, gate.tape = False, tape

    def routed(self, tape: Tape, hidden_gradient: bool = True) -> Routed:
        """The tape as a stack [L, N, ...]; without `hidden_gradient` the logits are those of detached hidden states."""
        if hidden_gradient:
            logits = torch.stack(tape.logits)
        else:
            logits = torch.stack(
                [nn.functional.linear(h, gate.weight) for h, gate in zip(tape.hidden, self.modules, strict=True)]
            )
        return Routed(logits, torch.stack(tape.reference), torch.stack(tape.experts), self.biases(), tape.segments)

    def biases(self) -> Tensor | None:
        """Choice biases [L, 1, E], None for families without."""
        found = [gate.bias for gate in self.modules if gate.bias is not None]
        return torch.stack(found)[:, None] if found else None

    def parameters(self) -> list[nn.Parameter]:
        """The trained weights in layer order."""
        return [gate.weight for gate in self.modules]

    def tensors(self, stock: bool = False) -> dict[str, Tensor]:
        """The gates as a router file holds them (layout.router_tensors), tuned or stock, fp32 copies on the CPU."""
        tensors = {}
        for gate in self.modules:
            weight = gate.reference if stock else gate.weight
            tensors[f"layer_{gate.layer:02d}.weight"] = weight.detach().cpu().clone()
            if gate.bias is not None:
                tensors[f"layer_{gate.layer:02d}.choice_bias"] = gate.bias.detach().cpu().clone()
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights of a router file. Raises UsageError when it is of another shape or has other biases."""
        shapes = router_tensors(self.config)
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if found != shapes:
            odd = sorted(set(found.items()) ^ set(shapes.items()))[0][0]
            raise UsageError(f"the router file does not fit this model: {odd} is missing, extra or of another shape")
        with torch.no_grad():
            for gate in self.modules:
                gate.weight.copy_(tensors[f"layer_{gate.layer:02d}.weight"])
                if gate.bias is not None:
                    gate.bias.copy_(tensors[f"layer_{gate.layer:02d}.choice_bias"])

    def reset(self) -> None:
        """Back to the stock gates, for another run with the same model."""
        with torch.no_grad():
            for gate in self.modules:
                gate.weight.copy_(gate.reference)
                gate.weight.grad = None


def find_gate(model: Any, config: ModelConfig, layer: int) -> tuple[nn.Module, str]:
    """The module that holds the gate of a layer, and the gate's name in it.

    transformers calls the class ...TopKRouter or ...TopkRouter in every family; the shape of its weight must fit, too.
    Raises CheckpointError.
    """
    shape = (config.router.num_experts, config.hidden_size)
    if len(model.model.layers) != config.num_layers:
        raise CheckpointError(f"the model has {len(model.model.layers)} layers, its config says {config.num_layers}")
    found = []
    for parent in model.model.layers[layer].modules():
        for name, child in parent.named_children():
            weight = getattr(child, "weight", None)
            named = type(child).__name__.lower().endswith("topkrouter")
            if named and isinstance(weight, Tensor) and tuple(weight.shape) == shape:
                found.append((parent, name))
    if len(found) != 1:
        raise CheckpointError(
            f"layer {layer} of {type(model).__name__}: {len(found)} modules look like a gate [{shape[0]}, {shape[1]}], "
            "expected 1: this version of transformers is not known, run: pip install 'remoe-edge[tune]'"
        )
    return found[0]


def decision(outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a gate of transformers returned as logits [N, E], weights [N, K] and experts [N, K], whatever its order.

    Every family returns them so but GraniteMoe, whose gate began with the experts in release 5.20 and ends with them
    in 5.23. Only experts are integers. Raises CheckpointError when it is something else.
    """
    kinds = [str(getattr(t, "dtype", type(t).__name__)) for t in outputs]
    whole = [kind == "torch.int64" for kind in kinds]
    if whole == [False, False, True]:
        logits, weights, experts = outputs
    elif whole == [True, False, False]:
        experts, weights, logits = outputs
    else:
        raise CheckpointError(
            f"a gate returned {', '.join(kinds)}, expected logits, weights and experts: this version of transformers "
            "is not known, run: pip install -U 'remoe-edge[tune]'"
        )
    return logits, weights, experts


def _experts_first(stock: nn.Module, hidden: int) -> bool:
    """Does this gate return the experts first? Asked of its forward itself, past whatever hooks it has."""
    probe = next(stock.parameters()).new_zeros(1, hidden)
    with torch.no_grad():
        outputs = stock.forward(probe)
    return decision(outputs)[2] is outputs[0]


def _tensor(module: nn.Module, name: str) -> Tensor:
    """A copy in fp32 of a weight or buffer of another module."""
    return getattr(module, name).detach().float().clone()
