"""What the engines are given: the native twin with a router tuned for a few steps, exported by `edge export --hf`."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from demo.native import CHECKPOINT, held_out_chapters
from edge.cli import main as edge
from export.checkpoint import Checkpoint
from export.families import read_model
from runtime.config import ModelConfig

TEXTS, TEXT_TOKENS = 4, 256
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 6, 16, 48
# Hard enough that more than a third of the choices change: an engine that still used the stock router could not be
# overlooked. Strengths are written out, so that other defaults do not change what is compared.
TUNING = (
    "--reuse", "1", "--smooth", "0.05", "--lag", "0.05", "--window", "0.05", "--trust", "0.5", "--steps", "8",
    "--lr", "3e-3", "--lr-warmup", "1", "--locality-warmup", "1", "--sequence-length", "256", "--batch", "4",
    "--eval-sequences", "0", "--device", "cpu", "--force",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A checkpoint with its stock routers, and the same as `edge export --hf` wrote it with the tuned ones."""

    stock: Path
    tuned: Path
    config: ModelConfig


@dataclass(frozen=True)
class Prepared:
    """`twin` is the committed checkpoint; `plain` is the variant that llama.cpp can represent."""

    twin: Subject
    plain: Subject
    router: Path
    bundle: Path
    texts: list[list[int]]
    prompts: list[list[int]]


def prepare(folder: Path) -> Prepared:
    """Tune, export and tokenise, in the new folder `folder`. Raises RuntimeError when a command fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chapters = held_out_chapters()
    data, router, bundle = folder / "tune.txt", folder / "tuned.router.safetensors", folder / "stock.bundle"
    data.write_text("\n".join(chapters[:3]), encoding="utf-8")
    _run("tune", CHECKPOINT, "--data", data, "--out", router, *TUNING)
    _run("export", CHECKPOINT, bundle)
    make_plain(CHECKPOINT, folder / "plain")
    twin = _subject(CHECKPOINT, folder / "twin-tuned", router)
    plain = _subject(folder / "plain", folder / "plain-tuned", router)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    ids = [tokenizer.encode(chapter).ids for chapter in chapters]
    texts = [chapter[:TEXT_TOKENS] for chapter in ids[-TEXTS:]]  # of which at most one was tuned on
    return Prepared(twin, plain, router, bundle, texts, [chapter[:PROMPT_TOKENS] for chapter in ids[:PROMPTS]])


def make_plain(source: Path, target: Path) -> None:
    """A Qwen2-MoE checkpoint as llama.cpp can represent it, like the published ones: same weights, same gates.

    llama.cpp's qwen2moe never divides the weights of the chosen experts by their sum, whatever `norm_topk_prob` says,
    and has no tied head. Neither matters for Qwen1.5-MoE-A2.7B. Gates are the same, so a router file fits both.
    """
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(source / "model.safetensors")
    if config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    config |= {"norm_topk_prob": False, "tie_word_embeddings": False}
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def _subject(stock: Path, tuned: Path, router: Path) -> Subject:
    _run("export", stock, tuned, "--hf", "--router", router)
    with Checkpoint.open(stock) as source:
        return Subject(stock, tuned, read_model(source.config, source.generation))


def _run(*words: str | Path) -> None:
    command = [str(word) for word in words]
    if code := edge(command):
        raise RuntimeError(f"edge {' '.join(command)}: exit code {code}")
