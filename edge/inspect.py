"""`edge inspect`: what a bundle (or a checkpoint, before it is one) holds and what it will need."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from edge import console
from edge.boards import BOARDS, board_plan
from runtime import layout
from runtime.bundle import Bundle
from runtime.config import ModelConfig
from runtime.errors import UsageError

NAME = "inspect"
HELP = "show what a bundle contains and what it needs"
EXAMPLES = """
edge inspect qwen.bundle
edge inspect ./Qwen1.5-MoE-A2.7B          a checkpoint: the figures its bundle will have
edge inspect config.json --json
"""
_VALUE_BYTES = 2  # fp16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge inspect`."""
    parser.add_argument(
        "path", metavar="BUNDLE|CHECKPOINT", type=Path, help="a bundle, a checkpoint folder or config.json"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the figures."""
    figures = _of_bundle(args.path) if (args.path / layout.MANIFEST).exists() else _of_checkpoint(args.path)
    if args.json:
        console.print_json(figures)
    else:
        print(console.format_table(list(_rows(figures)), title=str(args.path)))
    return 0


def model_figures(config: ModelConfig) -> dict[str, Any]:
    """What follows from the config alone; bytes as they lie in a bundle, the KV cache in fp16."""
    blob_bytes = layout.padded(layout.expert_bytes(config))
    moe_layers, experts = len(config.moe_layers), config.router.num_experts
    tensors = [layout.embed_tensors(config), layout.head_tensors(config)]
    tensors += [layout.layer_tensors(config, layer) for layer in range(config.num_layers)]
    row_values = sum(math.prod(row) for row in config.attention.cache_rows)
    figures = {
        "family": config.family,
        "layers": config.num_layers,
        "moe_layers": moe_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_context": config.max_context,
        "experts": experts,
        "top_k": config.router.top_k,
        "expert_intermediate_size": config.expert_intermediate_size,
        "shared_intermediate_size": config.shared_intermediate_size,
        "blob_bytes": blob_bytes,
        "token_cycle_bytes": config.experts_per_token * blob_bytes,
        "expert_bytes": moe_layers * experts * blob_bytes,
        "dense_bytes": _VALUE_BYTES * sum(math.prod(shape) for group in tensors for shape in group.values()),
        "router_bytes": 4 * sum(math.prod(shape) for shape in layout.router_tensors(config).values()),
        "kv_values_per_layer": row_values,
        "kv_bytes_per_token": _VALUE_BYTES * config.num_layers * row_values,
    }
    return {**figures, "boards": [board_plan(board, config) for board in BOARDS]}


def _of_bundle(path: Path) -> dict[str, Any]:
    bundle = Bundle.open(path)
    try:
        manifest = bundle.manifest
        return {
            "kind": "bundle",
            **model_figures(bundle.config),
            "routers": bundle.routers(),
            "graphs": list(manifest.graphs),
            "tokenizer": any(name.startswith("tokenizer/") for name in manifest.files),
            "files": len(manifest.files) + 1,
            "bytes": sum(entry.bytes for entry in manifest.files.values()),
            "source": manifest.source.name,
            "fingerprint": manifest.source.fingerprint,
            "generator": manifest.generator,
            "format_version": manifest.format_version,
        }
    finally:
        bundle.close()


def _of_checkpoint(path: Path) -> dict[str, Any]:
    from export.families import read_model
    from export.source import read_config, read_json

    if not path.exists():
        raise UsageError(f"{path}: no such bundle or checkpoint")
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(
            f"{path}: neither a bundle ({layout.MANIFEST}) nor a checkpoint (config.json); an export that was "
            "interrupted leaves no bundle: run `edge export` again"
        )
    generation = folder / "generation_config.json"
    config = read_model(read_config(path), read_json(generation) if generation.is_file() else {})
    return {"kind": "checkpoint", **model_figures(config)}


def _rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The table's rows: name and value as people read them."""
    f, size = figures, console.format_bytes
    shared = f", shared {f['shared_intermediate_size']}" if f["shared_intermediate_size"] else ""
    rows = [
        ("kind", f["kind"]),
        ("family", f["family"]),
        ("layers", f"{f['layers']}, {f['moe_layers']} with experts"),
        ("hidden / vocabulary", f"{f['hidden_size']} / {f['vocab_size']}"),
        ("context", f"{f['max_context']} tokens"),
        ("experts", f"{f['experts']} per layer, top-{f['top_k']}, width {f['expert_intermediate_size']}{shared}"),
        ("expert blob", f"{size(f['blob_bytes'])} ({f['blob_bytes']:,} bytes)"),
        ("one token cycle", f"{size(f['token_cycle_bytes'])} ({f['moe_layers'] * f['top_k']} blobs)"),
        ("all experts", size(f["expert_bytes"])),
        ("dense weights", size(f["dense_bytes"])),
        ("KV cache per token", f"{size(f['kv_bytes_per_token'])} in fp16, {f['kv_values_per_layer']} values per layer"),
        ("router", size(f["router_bytes"])),
        *((plan["board"], _slots_in_words(f, plan)) for plan in f["boards"]),
    ]
    if f["kind"] == "bundle":
        rows += [
            ("routers", ", ".join(f["routers"])),
            ("ONNX graphs", ", ".join(f["graphs"]) or "none"),
            ("tokenizer", "yes" if f["tokenizer"] else "no: token ids only"),
            ("files", f"{f['files']}, {size(f['bytes'])}"),
            ("source", f"{f['source']} ({f['fingerprint'][:16]})"),
            ("made by", f"{f['generator']}, format {f['format_version']}"),
        ]
    return rows


def _slots_in_words(f: dict[str, Any], plan: dict[str, Any]) -> str:
    size = console.format_bytes
    slots, experts = plan["slots_per_layer"], f["experts"]
    beside = f"beside dense weights and {plan['context']} tokens of KV cache"
    if not plan["runs"]:
        need = f["token_cycle_bytes"]
        return f"does not run: {size(plan['expert_bytes'])} are left {beside}, a token's experts need {size(need)}"
    return f"{slots} slots per layer, {slots / experts:.0%} of all experts: {size(plan['expert_bytes'])} {beside}"
