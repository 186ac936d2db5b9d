"""A task of lm-evaluation-harness on our engine and on transformers: `python -m interop.lm_eval_engine JOB OUT`

The task is made from held-out chapters: a verse's beginning, and four endings of which three are other verses'.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TASK = "verse_endings"
_CHOICES = 4
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
    """Verses cut in two, each with its own ending and the next verses'; the place of the right one moves."""
    verses = [line.split() for chapter in chapters for line in chapter.splitlines()]
    halves = [
        (" ".join(words[: len(words) // 2]), " " + " ".join(words[len(words) // 2 :]))
        for words in verses
        if len(words) > 7
    ]
    rows = []
    for number, (begin, _) in enumerate(halves[:limit]):
        endings = [halves[(number + step) % len(halves)][1] for step in range(_CHOICES)]
        turn = number % _CHOICES
        rows.append({"question": begin, "choices": endings[-turn:] + endings[:-turn], "answer": turn})
    return rows


def write_task(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The task's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / f"{TASK}.yaml").write_text(_YAML.format(name=TASK, rows=data.resolve()), encoding="utf-8")


def evaluate(job: dict[str, str]) -> dict[str, Any]:
    """Accuracy of our engine with the stock and with the tuned router, and of transformers with both checkpoints."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from remoe.harness import run_tasks
    from runtime.engine import Engine, EngineOptions

    folder = Path(job["tasks"])
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, Any] = {"lm_eval": lm_eval.__version__}
    with Engine.open(job["bundle"], EngineOptions(slots_per_layer=8, context=512, dtype="fp32")) as engine:
        for name, router in (("stock", "base"), ("tuned", job["router"])):
            engine.use_router(router, None)
            found[f"engine_{name}"] = run_tasks(engine, [TASK], folder=folder)[TASK]["acc"]
            model = HFLM(pretrained=job[name], dtype="float32", device="cpu", batch_size=8)
            done = lm_eval.simple_evaluate(model=model, tasks=[TASK], task_manager=manager, bootstrap_iters=0)
            found[f"transformers_{name}"] = done["results"][TASK]["acc,none"]
    return found


if __name__ == "__main__":
    result = evaluate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
