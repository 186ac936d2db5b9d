"""A task of lm-evaluation-harness on our engine and on transformers: `python -m interop.lm_eval_engine JOB OUT`

The task is made from held-out chapters: a verse, and four endings of which three are other verses'. Beside accuracies,
log-likelihoods of the same requests are compared, which are harder to get right by accident.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TASK = "verse_endings"
_ROWS = "rows.jsonl"
_CHOICES, _WORDS = 4, 3
_COMPARED = 10  # questions
_YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def questions(chapters: list[str], limit: int) -> list[dict[str, Any]]:
    """Verses without their last three words, which are to be found among the next verses'; their place moves."""
    verses = [line.split() for chapter in chapters for line in chapter.splitlines()]
    halves = [(" ".join(words[:-_WORDS]), " " + " ".join(words[-_WORDS:])) for words in verses if len(words) > 7]
    rows = []
    for number, (begin, _) in enumerate(halves[:limit]):
        endings = [halves[(number + step) % len(halves)][1] for step in range(_CHOICES)]
        turn = number % _CHOICES
        rows.append({"question": begin, "choices": endings[-turn:] + endings[:-turn], "answer": turn})
    return rows


def write_task(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The task's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / _ROWS
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / f"{TASK}.yaml").write_text(_YAML.format(name=TASK, rows=data.resolve()), encoding="utf-8")


def evaluate(job: dict[str, str]) -> dict[str, Any]:
    """Accuracy of our engine with the stock and with the tuned router, and of transformers with both checkpoints."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from remoe.harness import make_model, run_tasks
    from runtime.engine import Engine, EngineOptions

    folder = Path(job["tasks"])
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, Any] = {"lm_eval": lm_eval.__version__}
    with Engine.open(job["bundle"], EngineOptions(slots_per_layer=8, context=512, dtype="fp32")) as engine:
        for name, router in (("stock", "base"), ("tuned", job["router"])):
            engine.use_router(router, None)
            found[f"engine_{name}"] = run_tasks(engine, [TASK], folder=folder)[TASK]["acc"]
            theirs = HFLM(pretrained=job[name], dtype="float32", device="cpu", batch_size=8)
            done = lm_eval.simple_evaluate(model=theirs, tasks=[TASK], task_manager=manager, bootstrap_iters=0)
            found[f"transformers_{name}"] = done["results"][TASK]["acc,none"]
            found[f"largest_gap_{name}"] = largest_gap(make_model(engine), theirs, folder)
    return found


def largest_gap(ours: Any, theirs: Any, folder: Path) -> float:
    """Of log-likelihoods, in nats: of the choices of the first questions, with and without the question before them,
    and of whole texts, the last of which is longer than the context.
    """
    from lm_eval.api.instance import Instance

    rows = [json.loads(line) for line in (folder / _ROWS).read_text(encoding="utf-8").splitlines()]
    few = rows[:_COMPARED]
    parts = [(context, choice) for row in few for choice in row["choices"] for context in (row["question"], "")]
    texts = [row["question"] for row in few] + [" ".join(row["question"] for row in rows)]
    after = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(parts)]
    whole = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    gaps = [abs(a[0] - b[0]) for a, b in zip(ours.loglikelihood(after), theirs.loglikelihood(after), strict=True)]
    pairs = zip(ours.loglikelihood_rolling(whole), theirs.loglikelihood_rolling(whole), strict=True)
    return max(*gaps, *(abs(a - b) for a, b in pairs))


if __name__ == "__main__":
    result = evaluate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
