"""The options of a config.json, each taken by name; what nobody took and nobody knows is refused.

The rule: an option is used (taken here), or known not to change what the model computes (HARMLESS), or null. Any
other one stops the export, because ignoring it could silently change the arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from runtime.config import RopeConfig
from runtime.errors import CheckpointError

# Training, bookkeeping, and what transformers' base class writes into every file; none changes a forward pass.
HARMLESS = frozenset(
    {
        "architectures",
        "attention_dropout",
        "initializer_range",
        "use_cache",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "model_type",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "pad_token_id",
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_experts_implementation",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_return_dict",
        "torchscript",
        "id2label",
        "label2id",
        "problem_type",
        "num_labels",
        "is_encoder_decoder",
        "is_decoder",
        "chunk_size_feed_forward",
        "finetuning_task",
        "tokenizer_class",
        "unsloth_version",
        "unsloth_fixed",
    }
)
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_ROPE_KEYS = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "partial_rotary_factor",
    }
)
_REQUIRED = object()


class Options:
    """config.json of one checkpoint."""

    def __init__(self, raw: dict[str, Any], harmless: frozenset[str] = HARMLESS) -> None:
        self._raw = raw
        self._known = set(harmless)
        self.model_type = str(raw.get("model_type"))

    def size(self, name: str, default: Any = _REQUIRED, least: int = 1) -> Any:
        """A count of at least `least`; null counts as absent. Raises CheckpointError."""
        value = self.integer(name, default)
        if value is not None and not least <= value < 1 << 31:
            self.refuse(name, value, f"should be between {least} and 2^31")
        return value

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """A whole number; null counts as absent. Raises CheckpointError."""
        return self._take(name, default, int)

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A number, as a float."""
        value = self._take(name, default, (int, float))
        return float(value) if isinstance(value, int) else value

    def positive(self, name: str, default: Any = _REQUIRED) -> Any:
        """A number above 0, as a float."""
        value = self.number(name, default)
        if not value > 0:
            self.refuse(name, value, "should be positive")
        return value

    def only(self, name: str, *known: Any) -> Any:
        """An option of which only the values `known` are supported, the first when it is absent."""
        value = self._take(name, known[0], tuple({type(choice) for choice in known}))
        if value not in known:
            self.refuse(name, value, f"is not supported (known: {', '.join(str(choice) for choice in known)})")
        return value

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """true or false."""
        return self._take(name, default, bool)

    def integers(self, name: str) -> list[int]:
        """A list of whole numbers, empty when absent."""
        values = self._take(name, [], list)
        if any(type(v) is not int for v in values):
            self.refuse(name, values, "must be a list of whole numbers")
        return values

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id or a list of them; empty when absent."""
        value = self._take(name, [], (int, list))
        return tuple(self.integers(name)) if isinstance(value, list) else (value,)

    def experts(self) -> int:
        """The number of experts, under either of its two names; where both stand they must agree."""
        names = ("num_experts", "num_local_experts")
        found = {n: self.size(n, None) for n in names if self.size(n, None) is not None}
        if not found:
            raise CheckpointError(f"config.json ({self.model_type}): {names[0]} is missing")
        if len(set(found.values())) > 1:
            self.refuse(names[1], found[names[1]], f"differs from {names[0]} = {found[names[0]]}")
        return next(iter(found.values()))

    def activation(self) -> Any:
        """hidden_act in the runtime's words."""
        name = self._take("hidden_act", _REQUIRED, str)
        if name not in _ACTIVATIONS:
            self.refuse("hidden_act", name, f"is not supported (known: {', '.join(_ACTIVATIONS)})")
        return _ACTIVATIONS[name]

    def full_attention(self, window_in_use: bool, max_context: int) -> None:
        """Refuse a sliding window that the model would feel. Raises CheckpointError."""
        window = self.integer("sliding_window", None)
        self.integer("max_window_layers", None)
        types = self._take("layer_types", [], list)
        if any(t != "full_attention" for t in types):
            self.refuse("layer_types", types, "is not supported (known: 'full_attention')")
        if window_in_use and window is not None and 0 < window < max_context:
            self.refuse("sliding_window", window, f"is in use and below the context of {max_context}: not supported")

    def rope(
        self, dim: int, max_context: int, default_theta: float = 10000.0, partial: float | None = None
    ) -> RopeConfig:
        """Both spellings: rope_theta with rope_scaling (hub), and rope_parameters (transformers 5).

        `partial` is the family's default of partial_rotary_factor; None: only the whole head may turn.
        """
        theta = self.number("rope_theta", default_theta)
        scaling = self._rope_settings()
        values = Options(scaling, frozenset())
        unknown = sorted(set(scaling) - _ROPE_KEYS)
        if unknown:
            self.refuse("rope_scaling", unknown[0], f"has an unknown key (known: {', '.join(sorted(_ROPE_KEYS))})")
        turning = self._turning(values, dim, partial)
        theta = values.number("rope_theta", theta)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return RopeConfig(dim, theta, turning=turning)
        if kind == "linear":
            return RopeConfig(dim, theta, "linear", values.number("factor"), turning=turning)
        if kind != "yarn":
            self.refuse("rope_scaling.rope_type", kind, "is not supported (known: default, linear, yarn)")
        return replace(_yarn(values, dim, theta, max_context), turning=turning)

    def rope_number(self, name: str) -> float | None:
        """One number of the rope's settings; None when absent."""
        value: float | None = Options(self._rope_settings(), frozenset()).number(name, None)
        return value

    def finish(self) -> None:
        """Refuse what is neither taken, harmless nor null. Raises CheckpointError."""
        for name in sorted(set(self._raw) - self._known):
            if self._raw[name] is not None:
                self.refuse(name, self._raw[name], f"is an option that the exporter of {self.model_type} does not know")

    def refuse(self, name: str, value: Any, why: str) -> None:
        """Raise CheckpointError about one option."""
        raise CheckpointError(f"config.json ({self.model_type}): {name} = {value!r:.80} {why}")

    def _turning(self, rope: Options, dim: int, default: float | None) -> int | None:
        """RopeConfig.turning by partial_rotary_factor, of which transformers prefers the one inside the rope's own
        settings. Raises CheckpointError.
        """
        name = "partial_rotary_factor"
        factor = rope.number(name, self.number(name, 1.0 if default is None else default))
        if factor == 1.0:
            return None
        if default is None:
            self.refuse(name, factor, "is not supported (known: 1.0)")
        turning = int(dim * factor) if math.isfinite(factor) else 0
        if not 2 <= turning <= dim or turning % 2 or dim % 2:
            self.refuse(name, factor, f"of {dim} values per head is no even number between 2 and {dim}")
        return None if turning == dim else turning

    def _rope_settings(self) -> dict[str, Any]:
        return {**self._take("rope_scaling", {}, dict), **self._take("rope_parameters", {}, dict)}

    def _take(self, name: str, default: Any, kind: type | tuple[type, ...]) -> Any:
        self._known.add(name)
        value = self._raw.get(name)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(f"config.json ({self.model_type}): {name} is missing")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:
            self.refuse(name, value, f"should be of type {' or '.join(k.__name__ for k in kinds)}")
        return value


def _yarn(values: Options, dim: int, theta: float, max_context: int) -> RopeConfig:
    """As arXiv 2309.00071; how the attention factor follows from the other values is transformers' convention."""
    original = values.size("original_max_position_embeddings", max_context)
    factor = values.number("factor", max_context / original)
    attention = values.number("attention_factor", None)
    if attention is None:
        ours, all_dim = values.number("mscale", None), values.number("mscale_all_dim", None)
        if ours and all_dim:
            attention = mscale(factor, ours) / mscale(factor, all_dim)
        else:
            attention = mscale(factor, 1.0)
    return RopeConfig(
        dim,
        theta,
        "yarn",
        factor,
        original,
        values.number("beta_fast", None) or 32.0,
        values.number("beta_slow", None) or 1.0,
        values.flag("truncate", True),
        attention,
    )


def mscale(factor: float, scale: float) -> float:
    """YaRN's growth of queries and keys with the stretch `factor`, damped by `scale`."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
