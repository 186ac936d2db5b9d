"""Runs the study: `python -m bench.study CHECKPOINT --study native --out out/study`.

Every point (method, strength, seed) is tuned, measured on held-out text and appended to points.jsonl at once; points
and routers that are there already are not made again, so an interrupted study goes on, and two processes with different
`--only` may share a folder. Then the table and the plot are written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.study.measure import Bench
from bench.study.methods import DECIDING, Method, Strengths, methods
from bench.study.page import write_page
from demo import data
from export.families import parse_config
from export.source import read_config
from remoe.gates import Gates
from remoe.texts import Sequences, pack
from remoe.tune import Teacher, tune
from remoe.tune_options import TuneOptions
from runtime.errors import EdgeError, UsageError
from runtime.layout import expert_bytes, padded, router_tensors
from runtime.router_file import Provenance, gates_sha256, load_router, save_router
from runtime.strict import to_dict


@dataclass(frozen=True)
class Study:
    """What is the same for all methods."""

    train_texts: tuple[str, ...]  # sets of demo/data.py
    test_texts: tuple[str, ...]
    length: int
    steps: int
    batch: int
    lr: float
    train_tokens: int  # per set of texts; so are test_tokens
    test_tokens: int
    strengths: Strengths
    tuned_slots: tuple[int, ...]
    slots: tuple[int, ...]
    head_share: float


STUDIES = {
    # 5 million parameters: everything, three seeds
    "native": Study(
        train_texts=("bible",),  # all that it knows
        test_texts=("bible",),
        length=256,
        steps=40,
        batch=4,
        lr=1e-3,
        train_tokens=60_000,
        test_tokens=8_000,
        strengths=Strengths(
            remoe=(0.1, 0.3, 1.0),
            openings=(0.1, 0.3, 1.0),
            miss=(0.1, 0.3),
            prior=(0.1, 0.15, 0.2, 0.4, 0.6),
            energy=(0.07, 0.1, 0.13, 0.17, 0.2, 0.25, 0.3, 0.4, 0.6, 0.9),
            active=(0.15, 0.2, 0.4, 0.6),  # a weak one alone costs next to nothing: it needs no tuning
            after=(0.1, 0.17, 0.2, 0.25, 0.3),
        ),
        tuned_slots=(4, 8),
        slots=(4, 5, 8, 16, 28),
        head_share=1.0,
    ),
    # SmolLM2 as a mixture
    "demo": Study(
        train_texts=("prose", "docs", "code"),
        test_texts=("chats", "gsm8k", "humaneval", "prose"),
        length=256,
        steps=45,
        batch=2,
        lr=1.2e-3,
        train_tokens=8_000,
        test_tokens=6_000,
        strengths=Strengths(
            remoe=(3.0, 10.0),
            openings=(1.0, 3.0, 10.0),
            miss=(0.3,),
            prior=(0.1, 0.2, 0.3, 0.4),
            energy=(0.05, 0.065, 0.08, 0.11, 0.15, 0.2),
            active=(0.1, 0.2),
            after=(0.05, 0.065),
        ),
        tuned_slots=(8, 16),
        slots=(8, 10, 16, 28),
        head_share=0.25,
    ),
}


class Runner:
    """A model, its texts, and the points that are done."""

    def __init__(self, checkpoint: Path, study: Study, download: Path, out: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.study, self._out = study, out
        self.config = parse_config(read_config(checkpoint))
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._train = _texts(tokenizer, study, "train", download)
        test = _texts(tokenizer, study, "test", download)
        self._model, self._teacher = model, Teacher()
        self._bench = Bench(Gates(model, self.config), test, study.slots)

    def run(self, method: Method, seed: int) -> dict[str, Any]:
        """Tune where the method tunes, measure, keep the router file; returns the point."""
        started, tensors = time.monotonic(), self._bench.gates.tensors(stock=True)
        if method.objective is not None:
            tensors = self._tuned(method, seed)
        measured = self._bench.measure(tensors, method.prior, method.policy)
        point = asdict(measured) | {"seconds": round(time.monotonic() - started, 1)}
        return {"method": method.name, "strength": method.strength, "tuned_for": method.slots, "seed": seed, **point}

    def methods(self) -> list[Method]:
        """All of the study."""
        return list(methods(self.study.strengths, self.study.tuned_slots, len(self.config.moe_layers)))

    def wanted(self, seeds: int, only: list[str] | None) -> list[tuple[Method, int]]:
        """Methods and seeds: those that decide with every seed, the others with the first; stock, with which all are
        compared, is always among them. Raises UsageError for a name that no method has.
        """
        known, names = self.methods(), {method.name for method in self.methods()}
        if only and not set(only) <= names:
            raise UsageError(f"no method {min(set(only) - names)!r} (known: {', '.join(sorted(names))})")
        chosen = [method for method in known if not only or method.name in (*only, "stock")]
        return [(m, seed) for seed in range(seeds) for m in chosen if seed == 0 or m.name in DECIDING]

    def _tuned(self, method: Method, seed: int) -> dict[str, Any]:
        """The gates that the method gives, from the file of an earlier run of the same kind if there is one."""
        options = self._options(method, seed)
        provenance = Provenance(
            base_gates_sha256=gates_sha256(self._bench.gates.tensors(stock=True)),
            base_model=self.config.family,
            method=method.key,
            options=json.loads(json.dumps(to_dict(options))),
            data={"sha256": self._train.sha256, "tokens": self._train.tokens},
            steps=options.steps,
        )
        name = f"{provenance.method}-{seed}".replace("/", "-").replace(" ", "-").replace(",", "")
        path = self._out / "routers" / f"{name}.safetensors"
        if path.exists():
            tensors, found = load_router(path, router_tensors(self.config))
            if found == provenance:
                return tensors
        tuned = tune(self._model, self.config, self._train, options, teacher=self._teacher).tensors
        path.parent.mkdir(parents=True, exist_ok=True)
        save_router(path, tuned, provenance)
        return tuned

    def _options(self, method: Method, seed: int) -> TuneOptions:
        study, warm_up = self.study, max(1, self.study.steps // 8)
        assert method.objective is not None
        return TuneOptions(
            objective=replace(method.objective, warmup_steps=warm_up),
            steps=study.steps,
            batch=study.batch,
            micro_batch=study.batch,
            lr=study.lr,
            lr_warmup_steps=warm_up,
            schedule="cosine",
            head_share=study.head_share,
            seed=seed,
        )


def run_study(runner: Runner, seeds: int, out: Path, only: list[str] | None) -> list[dict[str, Any]]:
    """All points, in the order of the methods whatever that of the file."""
    file = out / "points.jsonl"
    done = set(_points(file))
    wanted = runner.wanted(seeds, only)
    for number, (method, seed) in enumerate(wanted, 1):
        if (method.name, method.strength, method.slots, seed) in done:
            continue
        point = json.loads(json.dumps(runner.run(method, seed)))
        with file.open("a") as stream:
            stream.write(json.dumps(point) + "\n")
        quality = next(iter(point["quality"].values()))
        _say(
            f"{number}/{len(wanted)} {method.key} seed {seed}: perplexity {quality['perplexity']:.3f}, KL "
            f"{quality['kl']:.4f}, EOR {quality['eor']:.3f}, misses {point['misses']} in {point['seconds']} s"
        )
    names = list(dict.fromkeys(method.name for method in runner.methods()))
    return sorted(_points(file).values(), key=lambda point: names.index(point["method"]))


def _points(file: Path) -> dict[tuple[str, float, int, int], dict[str, Any]]:
    """What is on file; two processes may both have measured the stock router."""
    points = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {(p["method"], p["strength"], p["tuned_for"], p["seed"]): p for p in points}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.study", description="compares ways to tune routers")
    parser.add_argument("checkpoint", type=Path, help="folder of the model")
    parser.add_argument("--study", choices=sorted(STUDIES), required=True, help="its settings")
    parser.add_argument("--seeds", type=int, default=3, help="of the methods that decide (default: 3)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="these methods alone")
    parser.add_argument("--slots", type=int, nargs="+", metavar="C", help="cache sizes (default: those of the study)")
    parser.add_argument("--test-tokens", type=int, metavar="N", help="of each set of texts (default: the study's)")
    parser.add_argument("--train-tokens", type=int, metavar="N", help="the same of those to tune on")
    parser.add_argument("--steps", type=int, metavar="N", help="of tuning (default: the study's)")
    parser.add_argument("--out", type=Path, required=True, help="folder for points, routers, table and plot")
    parser.add_argument("--download", type=Path, default=Path("out/download"), help="folder that keeps the packages")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        study = STUDIES[options.study]
        given = {name: getattr(options, name) for name in ("test_tokens", "train_tokens", "steps")}
        study = replace(study, **{name: value for name, value in given.items() if value is not None})
        if options.slots:
            study = replace(study, slots=tuple(options.slots))
        runner = Runner(options.checkpoint, study, options.download, options.out)
        points = run_study(runner, options.seeds, options.out, options.only)
        miss_bytes = len(runner.config.moe_layers) * padded(expert_bytes(runner.config))
        write_page(points, runner.config.router.top_k, miss_bytes, options.out)
    except EdgeError as error:
        _say(f"error: {error}")
        return error.exit_code
    return 0


def _texts(tokenizer: Any, study: Study, split: str, download: Path) -> Sequences:
    """So many tokens of each set, whole documents in the order of the set, cut to a few sequences each."""
    train = split == "train"
    names, tokens = (study.train_texts, study.train_tokens) if train else (study.test_texts, study.test_tokens)
    documents = []
    for name in names:
        count = 0
        for text in data.load(name, split, download):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][: 4 * study.length]
            documents.append(ids)
            count += len(ids)
            if count >= tokens:
                break
    return pack(documents, study.length, len(tokenizer))


def _say(line: str) -> None:
    print(f"study: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
