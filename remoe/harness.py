"""Tasks of lm-evaluation-harness on the engine itself: quality of what really runs, cache and router included.

A context is read at once, as a prompt is; with cache-prior routing the tokens after it are read one by one, as decode
does, so the rule acts on them. Contexts that are too long lose their beginning. What comes before a text without
context, and how long texts are cut, is as in the harness's own adapter for transformers (HFLM): figures compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from runtime.engine import Engine, GenerateOptions
from runtime.errors import EdgeError, UsageError

_ANSWER_TOKENS = 256  # where a task does not say how long an answer may be
_INSTALL = 'tasks need lm-evaluation-harness: pip install "remoe-edge[eval]"'


def run_tasks(
    engine: Engine, tasks: Sequence[str], limit: int | None = None, folder: Path | None = None
) -> dict[str, dict[str, float]]:
    """Metric by name by task. `limit`: examples of each; `folder` has task files beside those of the harness.

    Raises UsageError when the harness is not installed or knows no such task, EdgeError when it fails.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError(_INSTALL) from None
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: expected at least 1")
    # Reading thousands of task files takes a while, so those of the harness only where yours do not have it all.
    manager = TaskManager(include_path=str(folder), include_defaults=False) if folder else TaskManager()
    if folder and not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(
            f"lm-evaluation-harness {lm_eval.__version__} has no task {unknown[0]!r}: lm_eval --tasks list"
        )
    try:
        found = lm_eval.simple_evaluate(
            model=make_model(engine), tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0
        )  # fmt: skip
    except EdgeError:
        raise
    except Exception as error:  # the harness and the data sets behind it raise anything
        raise EdgeError(f"lm-evaluation-harness: {type(error).__name__}: {error}") from error
    return {task: _numbers(values) for task, values in found["results"].items()}


def make_model(engine: Engine) -> Any:
    """The engine as a model of the harness (lm_eval.api.model.LM). Raises UsageError without the harness."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise UsageError(_INSTALL) from None

    class EdgeModel(LM):  # type: ignore[misc]
        """Hands every request to a `Scorer`."""

        def __init__(self) -> None:
            super().__init__()
            self._scorer = Scorer(engine)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return [self._scorer.continuation(*request.args) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return [self._scorer.whole(*request.args) for request in requests]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [self._scorer.answer(*request.args) for request in requests]

    return EdgeModel()


class Scorer:
    """Log-likelihoods and answers of an engine, texts in."""

    def __init__(self, engine: Engine) -> None:
        """Raises UsageError for a bundle without tokenizer."""
        if engine.tokenizer is None:
            raise UsageError(f"{engine.bundle.path} has no tokenizer: tasks are made of texts")
        self._engine, self._tokenizer = engine, engine.tokenizer

    def continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log-likelihood of `continuation` after `context`, and whether greedy decoding would say it."""
        ids, start = self._split(context, continuation)
        return self._score(ids, start)

    def whole(self, text: str) -> float:
        """Log-likelihood of a text, all of its tokens: a prefix stands before the first.

        One longer than the context is read in windows, each token scored once; the last window is a full one, too.
        """
        ids = [self._prefix, *self._engine.encode(text)]
        total, at, size = 0.0, 1, self._engine.context
        while at < len(ids):
            end = min(len(ids), at + size)
            first = max(0, end - size - 1)
            total += self._score(ids[first:end], at - first)[0]
            at = end
        return total

    def answer(self, context: str, settings: dict[str, Any]) -> str:
        """What is generated after `context` until one of the settings' `until`."""
        until = settings.get("until") or []
        stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
        longest = int(settings.get("max_gen_toks") or _ANSWER_TOKENS)
        new = min(longest, self._engine.context - 1)
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        ids = self._engine.encode(context)[-(self._engine.context - new) :]
        options = GenerateOptions(new, temperature=temperature, top_p=float(settings.get("top_p") or 1.0), stop=stops)
        for _ in self._engine.generate(ids, options):
            pass
        return self._engine.summary().text

    def _split(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Ids of both, cut to the engine's context from the left, and where the continuation starts.

        A blank between the two belongs to the continuation, whose first token holds it.
        """
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        before = self._engine.encode(bare) if bare else [self._prefix]
        whole = self._engine.encode(bare + continuation) if bare else [*before, *self._plain(continuation)]
        start = min(len(before), len(whole) - 1)
        cut = max(0, len(whole) - self._engine.context - 1)  # the last token is not read
        if start - cut < 1:
            raise UsageError(f"a continuation of {len(whole) - start} tokens does not fit the context: use --context")
        return whole[cut:], start - cut

    def _plain(self, text: str) -> list[int]:
        ids = self._engine.encode(text)
        return ids[1:] if ids[0] == self._prefix and len(ids) > 1 else ids

    @cached_property
    def _prefix(self) -> int:
        """What the first token of a text is predicted from: the tokenizer's begin token, or without one its end token;
        the model's own where the tokenizer's settings name neither.
        """
        config = self._engine.config
        named = [self._tokenizer.special_id(name) for name in ("bos_token", "eos_token")]
        found = next((i for i in (*named, config.bos_token_id, *config.eos_token_ids) if i is not None), None)
        if found is None:
            raise UsageError("this model has neither a begin nor an end token, so a text without context has no score")
        return found

    @torch.inference_mode()
    def _score(self, ids: Sequence[int], start: int) -> tuple[float, bool]:
        """Log-likelihood of ids[start:] given those before, and whether each is the best token."""
        decoder, stepwise = self._engine.decoder, self._engine.options.prior is not None
        decoder.rewind()
        inputs = torch.tensor(ids[:-1])
        parts = [inputs[:start], *inputs[start:].split(1)] if stepwise else [inputs]
        states = torch.cat([decoder.states(part) for part in parts if len(part)])
        targets = torch.tensor(ids[start:])
        log_p = decoder.head(states[start - 1 :]).cpu().double().log_softmax(-1)
        likelihood = float(log_p.gather(-1, targets[:, None]).sum())
        return likelihood, bool((log_p.argmax(-1) == targets).all())


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Metrics without their filter's name ("acc,none") where that says nothing."""
    found = {name.removesuffix(",none"): value for name, value in values.items() if "_stderr" not in name}
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}
