"""Routing traces: which experts every token was sent to, in one safetensors file. docs/traces.md describes it.

Shapes: N tokens, L layers with experts, K experts per token, E experts of a layer, H hidden size. A trace holds whole
requests one after the other; a token's row is what the router saw and chose when that token was the input. numpy only:
a trace is read, simulated and scored without a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from remoe.trace_file import Array, open_arrays
from remoe.trace_writer import RECORDED_ON_REQUEST, Block, TraceWriter, array_dtypes
from runtime.config import RouterConfig
from runtime.errors import UsageError
from runtime.strict import from_dict, parse_json, to_dict

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Origin:
    """A router or a text: its name, and the SHA-256 of what it held."""

    name: str
    sha256: str


@dataclass(frozen=True)
class TraceInfo:
    """What was recorded. `gates_sha256` is the fingerprint of the model's stock gates, whichever `router` routed.

    `expert_bytes` is what reading one expert takes. A prompt is routed in chunks of `prefill_chunk` tokens, each of
    which asks the cache once per layer. `routing` is "stock" or tells the rule that chose instead of it.
    """

    kind: Literal["generated", "teacher-forced"]
    model: str
    gates_sha256: str
    router: Origin
    source: Origin
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    expert_bytes: int
    prefill_chunk: int
    rules: RouterConfig
    routing: str = "stock"
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, eq=False, kw_only=True)
class Trace(Block):
    """A trace in memory, which is one block of whole requests with the facts about them; `logits` and `hidden` may be
    read from the file only when they are looked at.

    `experts` uint8 (uint16 above 256 experts) [N, L, K], the router's order, best first. `weights` fp16 [N, L, K].
    `tokens`, `requests`, `positions` int32 [N]: the input token, its request, its place in that request. `decode`
    uint8 [N]: 1 for a decode step, 0 for a prompt. `logits` fp16 [N, L, E] and `hidden` fp16 [N, L, H] (router inputs)
    where they were recorded; `choice_bias` fp32 [L, E] for families whose router has one.
    """

    info: TraceInfo
    choice_bias: Array | None = None

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read and check a trace. Raises UsageError naming the file and what is wrong with it."""
        path = Path(path)
        header, arrays = open_arrays(path)
        info = _info(header, path)
        return cls.from_arrays(info, arrays, str(path))

    @classmethod
    def from_arrays(cls, info: TraceInfo, arrays: dict[str, Array], where: str = "trace") -> Trace:
        """A checked trace of these arrays, by name. Raises UsageError naming `where` and what is wrong."""
        _check_shapes(info, arrays, where)
        trace = cls(info=info, **arrays)
        _check_values(trace, where)
        return trace

    @classmethod
    def from_blocks(cls, info: TraceInfo, blocks: list[Block], choice_bias: Array | None = None) -> Trace:
        """Steps in the order in which they ran, put together. Raises UsageError when there are none."""
        if not blocks:
            raise UsageError("nothing was routed: a trace needs at least one token")
        parts = [block.arrays(info.num_experts) for block in blocks]
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if choice_bias is not None:
            arrays["choice_bias"] = np.asarray(choice_bias, np.float32)
        return cls.from_arrays(info, arrays)

    def save(self, path: str | Path) -> None:
        """Write the trace; the file appears whole or not at all. Raises UsageError when it cannot be written."""
        with TraceWriter(path, self.info, self.choice_bias) as writer:
            writer.add(self)

    def __len__(self) -> int:
        return len(self.tokens)

    def request_rows(self) -> list[range]:
        """The rows of each request, in order."""
        starts = np.flatnonzero(np.diff(self.requests, prepend=self.requests[0] - 1)).tolist()
        return [range(a, b) for a, b in zip(starts, [*starts[1:], len(self)], strict=True)]

    def check_same_model(self, gates_sha256: str, model: str) -> None:
        """Raises UsageError when the trace was recorded from another model."""
        if self.info.gates_sha256 != gates_sha256:
            raise UsageError(
                f"the trace is of {self.info.model} (gates {self.info.gates_sha256[:12]}), not of {model} (gates "
                f"{gates_sha256[:12]}): record one with `edge trace BUNDLE`"
            )


def array_types(info: TraceInfo) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """dtype and shape of every tensor of a trace; None stands for N."""
    layers, dtypes = len(info.moe_layers), array_dtypes(info.num_experts)
    widths = {"experts": info.top_k, "weights": info.top_k, "logits": info.num_experts, "hidden": info.hidden_size}
    shapes = {name: (None, layers, widths[name]) if name in widths else (None,) for name in dtypes}
    types: dict[str, tuple[str, tuple[int | None, ...]]] = {name: (dtypes[name], shapes[name]) for name in dtypes}
    return types | {"choice_bias": ("float32", (layers, info.num_experts))}


OPTIONAL = (*RECORDED_ON_REQUEST, "choice_bias")


def info_json(info: TraceInfo) -> Any:
    """The facts of a trace as plain JSON values."""
    return to_dict(info)


def _info(header: dict[str, str], path: Path) -> TraceInfo:
    if "trace" not in header:
        raise UsageError(f"{path}: a safetensors file, but no trace: record one with `edge trace BUNDLE`")
    facts = parse_json(header["trace"].encode(), str(path))
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        newer = type(version) is int and version > FORMAT_VERSION
        hint = "made by a newer release: upgrade remoe-edge" if newer else "record it again with `edge trace BUNDLE`"
        raise UsageError(f"{path}: trace format {version!r}, this release reads {FORMAT_VERSION}: {hint}")
    info = from_dict(TraceInfo, facts, str(path))
    rules = {
        "num_experts": 1 <= info.num_experts <= 1 << 16,
        "top_k": 1 <= info.top_k <= info.num_experts,
        "moe_layers": bool(info.moe_layers) and list(info.moe_layers) == sorted(set(info.moe_layers)),
        "hidden_size": info.hidden_size >= 1,
        "expert_bytes": info.expert_bytes >= 1,
        "prefill_chunk": info.prefill_chunk >= 1,
        "rules": (info.rules.num_experts, info.rules.top_k) == (info.num_experts, info.top_k),
    }
    wrong = [name for name, holds in rules.items() if not holds]
    if wrong:
        raise UsageError(f"{path}: {wrong[0]} is {getattr(info, wrong[0])!r}, which no model has")
    return info


def _check_shapes(info: TraceInfo, arrays: dict[str, Array], where: str) -> None:
    types = array_types(info)
    unknown, missing = set(arrays) - set(types), set(types) - set(OPTIONAL) - set(arrays)
    if unknown or missing:
        found = f"unknown tensor {min(unknown)!r}" if unknown else f"tensor {min(missing)!r} is missing"
        raise UsageError(f"{where}: {found} (a trace has {', '.join(types)})")
    if info.rules.choice_bias != ("choice_bias" in arrays):
        raise UsageError(f"{where}: choice_bias is there only for a router that has one, and then always")
    count = len(arrays["tokens"]) if arrays["tokens"].ndim else 0
    if not count:
        raise UsageError(f"{where}: no tokens in it")
    for name, array in arrays.items():
        dtype, shape = types[name]
        wanted = tuple(count if size is None else size for size in shape)
        if (str(array.dtype), array.shape) != (dtype, wanted):
            raise UsageError(
                f"{where}: {name} is {array.dtype} {list(array.shape)}, expected {dtype} {list(wanted)} "
                f"({count} tokens, {len(info.moe_layers)} layers, top {info.top_k} of {info.num_experts} experts)"
            )


def _check_values(trace: Trace, where: str) -> None:
    ordered = np.sort(trace.experts, axis=-1)
    new = np.diff(trace.requests, prepend=trace.requests[0] - 1) != 0
    rules = {
        "an expert of experts is beyond num_experts": int(ordered.max()) < trace.info.num_experts,
        "experts names one expert twice for a token": bool((ordered[..., 1:] != ordered[..., :-1]).all()),
        "weights holds a value that is no number": bool(np.isfinite(trace.weights).all()),
        "tokens or positions holds a negative number": min(int(trace.tokens.min()), int(trace.positions.min())) >= 0,
        "requests is not in order": bool((np.diff(trace.requests) >= 0).all()),
        "decode is neither 0 nor 1": int(trace.decode.max()) <= 1,
        "positions has a gap": bool((np.diff(trace.positions)[~new[1:]] == 1).all()),
        "a prompt follows its decode steps": bool((np.diff(trace.decode.astype(np.int8))[~new[1:]] >= 0).all()),
    }
    wrong = [problem for problem, holds in rules.items() if not holds]
    if wrong:
        raise UsageError(f"{where}: damaged: {wrong[0]}; record it again with `edge trace BUNDLE`")


__all__ = ["FORMAT_VERSION", "Block", "Origin", "Trace", "TraceInfo", "TraceWriter"]
