"""Hand-made bundles with random dense weights, and the same parts computed plainly in fp64 to compare with.

The reference joins past and new rows, loops over heads, and builds MLA's keys and values per head: none of the short
cuts of the graphs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from blake3 import blake3
from torch.nn import functional

from export.blocks import build_graphs
from runtime.config import AttentionConfig, ModelConfig, RopeConfig, RouterConfig
from runtime.layout import (
    EMBED_FILE,
    HEAD_FILE,
    MANIFEST,
    PAGE_BYTES,
    embed_tensors,
    expert_bytes,
    head_tensors,
    layer_file,
    layer_tensors,
    padded,
)
from runtime.manifest import FORMAT_VERSION, ExpertLayout, FileEntry, Manifest, Source, required_files

Tensors = dict[str, torch.Tensor]


def gqa(heads: int, kv_heads: int, size: int = 16, **changes: object) -> AttentionConfig:
    """Grouped-query attention with `changes` to its fields."""
    return replace(AttentionConfig("gqa", heads, kv_heads, size, size, size, size**-0.5), **changes)  # type: ignore[arg-type]


def mla(heads: int, q_lora_rank: int | None) -> AttentionConfig:
    """Latent attention: heads of 12 + 8, values of 10, a latent of 24."""
    return AttentionConfig(
        "mla", heads, 1, 12, 10, 8, 20**-0.5, q_lora_rank=q_lora_rank, kv_lora_rank=24, latent_norm_eps=1e-5
    )


def model(attention: AttentionConfig, **changes: object) -> ModelConfig:
    """Two layers, the second with experts; `changes` to its fields."""
    return replace(
        ModelConfig(
            family="qwen2_moe",
            vocab_size=96,
            hidden_size=64,
            num_layers=2,
            max_context=128,
            norm_eps=1e-6,
            activation="silu",
            attention=attention,
            rope=RopeConfig(attention.rope_head_dim, 10000.0),
            router=RouterConfig(5, 2),
            moe_layers=(1,),
            expert_intermediate_size=24,
            shared_intermediate_size=40,
            dense_intermediate_size=56,
        ),
        **changes,  # type: ignore[arg-type]
    )


MODELS: dict[str, ModelConfig] = {
    "mha": model(gqa(4, 4)),
    "gqa-bias-gate": model(gqa(8, 2, qkv_bias=True, o_bias=True), shared_gate=True),
    "mqa-gelu-tied": model(gqa(6, 1), activation="gelu", tied_embeddings=True),
    "head-norm-no-mlp": model(
        gqa(8, 4, 24, qk_norm="head"), moe_layers=(0, 1), shared_intermediate_size=0, dense_intermediate_size=0
    ),
    "full-norm-clip": model(gqa(4, 4, qk_norm="full", clip_qkv=1.0)),
    "bias-clip": model(gqa(4, 2, qkv_bias=True, clip_qkv=0.75)),
    "scales-gelu-tanh": model(
        gqa(4, 2, scale=0.1), activation="gelu_tanh", embed_scale=12.0, residual_scale=0.22, logits_scale=1 / 6
    ),
    "mla": model(mla(4, None)),
    "mla-q-lora": model(mla(4, 20), shared_gate=True),
}


@dataclass(frozen=True)
class HandMade:
    """A bundle on disk without experts, and its dense tensors by file."""

    path: Path
    config: ModelConfig
    files: dict[str, Tensors]


def make_bundle(path: Path, config: ModelConfig, seed: int = 0) -> HandMade:
    """Write dense files, graphs of both dtypes and a manifest; experts and routers are listed but not there."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBED_FILE: embed_tensors(config), HEAD_FILE: head_tensors(config)}
    shapes |= {layer_file(n): layer_tensors(config, n) for n in range(config.num_layers)}
    files = {
        file: {name: _random(name, shape, generator) for name, shape in table.items()} for file, table in shapes.items()
    }
    (path / "dense").mkdir(parents=True)
    places: dict[tuple[str, str], tuple[int, int]] = {}
    for file, tensors in files.items():
        places |= {(file, name): place for name, place in _write(path / file, tensors).items()}
    for dtype in ("fp16", "fp32"):
        for file, graph in build_graphs(config, dtype, lambda file, name: places[file, name]):
            (path / file).write_bytes(graph)
    write_manifest(path, config)
    return HandMade(path, config, files)


def write_manifest(path: Path, config: ModelConfig, graphs: tuple[str, ...] = ("fp16", "fp32")) -> None:
    """A manifest of the files that are there; the others get a digest of zeros."""
    size = expert_bytes(config)
    entries = {file: FileEntry(padded(size), "0" * 64, "0" * 16) for file in required_files(config)}
    for file in sorted(path.glob("dense/*")):
        data = file.read_bytes()
        digests = blake3(data).hexdigest(), xxhash.xxh3_64_hexdigest(data)
        entries[f"dense/{file.name}"] = FileEntry(len(data), *digests)
    layout = ExpertLayout("fp16", size, padded(size))
    manifest = Manifest(FORMAT_VERSION, "test", Source("random", "0" * 64), config, layout, graphs, entries)
    (path / MANIFEST).write_bytes(manifest.to_json())


def reference_block(
    config: ModelConfig, w: Tensors, x: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_attn, h and the two new cache rows of tokens x [S, H] after `past` rows, all fp64."""
    w = _double(w)
    normed = _norm(x, w["attn_norm"], config.norm_eps)
    attend = _mla if config.attention.kind == "mla" else _gqa
    mixed, first, second = attend(config, w, normed, past[0].double(), past[1].double())
    x = x + config.residual_scale * (mixed @ w["o"].T + w.get("o_bias", 0))
    return x, _norm(x, w["ffn_norm"], config.norm_eps), first, second


def reference_mlp(config: ModelConfig, w: Tensors, h: torch.Tensor) -> torch.Tensor:
    """The shared experts or dense MLP, fp64."""
    w = _double(w)
    gate, up = (h @ w["mlp.gate_up"].T).chunk(2, dim=-1)
    out = (_activation(config, gate) * up) @ w["mlp.down"].T
    return out * torch.sigmoid(h @ w["mlp.router"].T) if "mlp.router" in w else out


def reference_expert(config: ModelConfig, h: torch.Tensor, blob: Tensors) -> torch.Tensor:
    """One expert, fp64."""
    w = _double(blob)
    return (_activation(config, h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T


def reference_head(config: ModelConfig, files: dict[str, Tensors], x: torch.Tensor) -> torch.Tensor:
    """Logits, fp64."""
    head = _double(files[HEAD_FILE])
    matrix = files[EMBED_FILE]["embed"].double() if config.tied_embeddings else head["head"]
    return config.logits_scale * _norm(x, head["norm"], config.norm_eps) @ matrix.T


def _gqa(config: ModelConfig, w: Tensors, h: torch.Tensor, past_k: torch.Tensor, past_v: torch.Tensor):  # type: ignore[no-untyped-def]
    a, eps, start = config.attention, config.norm_eps, past_k.shape[0]
    widths = [a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim, a.num_kv_heads * a.v_head_dim]
    q, k, v = (h @ w["qkv"].T + w.get("qkv_bias", 0)).split(widths, dim=-1)
    if a.qk_norm == "full":
        q, k = _norm(q, w["q_norm"], eps), _norm(k, w["k_norm"], eps)
    if a.clip_qkv is not None:
        q, k, v = (t.clamp(-a.clip_qkv, a.clip_qkv) for t in (q, k, v))
    q, k, v = (t.unflatten(-1, (-1, size)) for t, size in ((q, a.head_dim), (k, a.head_dim), (v, a.v_head_dim)))
    if a.qk_norm == "head":
        q, k = _norm(q, w["q_norm"], eps), _norm(k, w["k_norm"], eps)
    q, k = _rope(config, q, start), _rope(config, k, start)
    keys, values = torch.cat([past_k, k]), torch.cat([past_v, v])
    group = a.num_heads // a.num_kv_heads
    heads = [_attend(a.scale, q[:, n], keys[:, n // group], values[:, n // group]) for n in range(a.num_heads)]
    return torch.cat(heads, dim=-1), k, v


def _mla(config: ModelConfig, w: Tensors, h: torch.Tensor, past_c: torch.Tensor, past_r: torch.Tensor):  # type: ignore[no-untyped-def]
    a, start = config.attention, past_c.shape[0]
    if a.q_lora_rank is None:
        q = h @ w["q"].T
    else:
        q = _norm(h @ w["q_a"].T, w["q_a_norm"], a.latent_norm_eps) @ w["q_b"].T
    q = q.unflatten(-1, (a.num_heads, a.head_dim + a.rope_head_dim))
    q = torch.cat([q[..., : a.head_dim], _rope(config, q[..., a.head_dim :], start)], dim=-1)
    latent, turned = (h @ w["kv_a"].T).split([a.kv_lora_rank, a.rope_head_dim], dim=-1)
    latent = _norm(latent, w["kv_a_norm"], a.latent_norm_eps)
    turned = _rope(config, turned[:, None], start)[:, 0]
    latents, rope_keys = torch.cat([past_c, latent]), torch.cat([past_r, turned])
    heads = []
    for n in range(a.num_heads):
        keys = torch.cat([latents @ w["k_b"][n].T, rope_keys], dim=-1)
        heads.append(_attend(a.scale, q[:, n], keys, latents @ w["v_b"][n].T))
    return torch.cat(heads, dim=-1), latent, turned


def _attend(scale: float, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One head: q [S, D] over k, v [T + S, D]; token i sees rows up to T + i."""
    scores = scale * q @ k.T
    hidden = torch.ones_like(scores).triu(k.shape[0] - q.shape[0] + 1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def _rope(config: ModelConfig, x: torch.Tensor, start: int) -> torch.Tensor:
    """x [S, heads, D] turned pair by pair: component i with component i + D / 2."""
    half = config.rope.dim // 2
    turned = x.clone()
    for token in range(x.shape[0]):
        for i in range(half):
            angle = (start + token) * config.rope.theta ** (-i / half)
            c, s, a, b = math.cos(angle), math.sin(angle), x[token, :, i], x[token, :, i + half]
            turned[token, :, i], turned[token, :, i + half] = a * c - b * s, b * c + a * s
    return turned


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _activation(config: ModelConfig, x: torch.Tensor) -> torch.Tensor:
    if config.activation == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if config.activation == "gelu_tanh" else "none")


def _double(tensors: Tensors) -> Tensors:
    return {name: tensor.double() for name, tensor in tensors.items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm"):
        return (1 + 0.2 * noise).half()
    return (noise if len(shape) == 1 else noise / shape[-1] ** 0.5).half()


def _write(path: Path, tensors: Tensors) -> dict[str, tuple[int, int]]:
    """A safetensors file as bundles have it; returns offset and length of every tensor."""
    header, start = {}, 0
    for name, tensor in tensors.items():
        end = start + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    data_at = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES
    text = text.ljust(data_at - 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.numpy().tobytes())
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (data_at + begin, end - begin) for name, (begin, end) in offsets.items()}
