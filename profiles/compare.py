"""Two runs side by side: by how much TPOT, misses and energy fell, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from profiles.rundir import Request, Run
from profiles.summary import decode_energy
from profiles.telemetry.energy import board_rails

RESAMPLES = 10_000
MIN_PROMPTS = 5  # fewer cannot be resampled into an interval that means anything
_SEED = 0
_LEVEL = (2.5, 97.5)
_SETTINGS = (
    "backend", "arithmetic", "dtype", "router", "policy", "scope", "slots_per_layer", "direct_io", "reader", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Reduction:
    """1 - other / base of a mean per token. `low` and `high` bound 95 %, None with the reason in `why`."""

    base: float | None
    other: float | None
    reduction: float | None
    low: float | None
    high: float | None
    prompts: int
    paired: bool
    why: str = ""


Amount = Callable[[Run, Request], float | None]


def reduction(base: Run, other: Run, amount: Amount) -> Reduction:
    """`amount` is the sum over an answer's decoded tokens, None where it was not measured.

    Whole prompts are drawn again and again, with all their repeats: the tokens of one answer resemble each other, so
    drawing tokens would claim far too much certainty. Prompts that both runs have are drawn as pairs.
    """
    left, right = _per_prompt(base, amount), _per_prompt(other, amount)
    paired = bool(left.keys() & right.keys()) and _same_work(base, other)
    if paired:
        names = sorted(left.keys() & right.keys())
        left, right = {n: left[n] for n in names}, {n: right[n] for n in names}
    first, second = np.array(list(left.values())), np.array(list(right.values()))
    if not len(first) or not len(second):
        return Reduction(None, None, None, None, None, 0, paired, "not measured in both runs")
    means = [float(rows[:, 0].sum() / rows[:, 1].sum()) for rows in (first, second)]
    prompts = min(len(first), len(second))
    if not means[0]:
        return Reduction(means[0], means[1], None, None, None, prompts, paired, "there is nothing to reduce")
    if prompts < MIN_PROMPTS:
        why = f"{prompts} prompts are too few for an interval, at least {MIN_PROMPTS} are needed"
        return Reduction(means[0], means[1], 1 - means[1] / means[0], None, None, prompts, paired, why)
    low, high = np.percentile(_bootstrap(first, second, paired), _LEVEL)
    return Reduction(means[0], means[1], 1 - means[1] / means[0], float(low), float(high), prompts, paired)


def compare(base: Run, other: Run) -> dict[str, Reduction]:
    """TPOT, misses, bytes and energy per decoded token."""
    rails = {id(run): board_rails(run.samples) for run in (base, other)}

    def joules(run: Run, request: Request) -> float | None:
        return decode_energy(request, run.samples, rails[id(run)]).joules

    return {
        "tpot_ms": reduction(base, other, lambda _, request: sum(r.total_ms for r in request.decode)),
        "misses": reduction(base, other, lambda _, request: float(sum(sum(r.misses) for r in request.decode))),
        "bytes": reduction(base, other, lambda _, request: float(sum(r.bytes for r in request.decode))),
        "joules": reduction(base, other, joules),
    }


def differences(base: Run, other: Run) -> list[tuple[str, Any, Any]]:
    """What else is not the same in two runs: (name, base, other). A comparison is fair when one row is left."""
    rows = [(name, _engine(base).get(name), _engine(other).get(name)) for name in ("model", *_SETTINGS)]
    rows += [(name, base.header["machine"].get(name), other.header["machine"].get(name)) for name in _MACHINE]
    rows += [("clock_limits", base.header.get("clock_limits"), other.header.get("clock_limits"))]
    rows += [("workload", base.header["workload"]["sha256"], other.header["workload"]["sha256"])]
    left, right = base.header["protocol"], other.header["protocol"]
    rows += [(name, left.get(name), right.get(name)) for name in left if name != "name"]
    return [row for row in rows if row[1] != row[2]]


_MACHINE = ("device", "usable_cores", "power_mode", "kernel", "versions", "commit")


def _bootstrap(first: np.ndarray, second: np.ndarray, paired: bool) -> np.ndarray:
    """Reductions [RESAMPLES] of resampled prompts; rows are (amount, tokens)."""
    generator = np.random.default_rng(_SEED)
    drawn_first = generator.integers(len(first), size=(RESAMPLES, len(first)))
    drawn_second = drawn_first if paired else generator.integers(len(second), size=(RESAMPLES, len(second)))
    base, other = first[drawn_first].sum(axis=1), second[drawn_second].sum(axis=1)
    return np.asarray(1 - (other[:, 0] / other[:, 1]) / (base[:, 0] / base[:, 1]))


def _per_prompt(run: Run, amount: Amount) -> dict[str, tuple[float, int]]:
    """(amount, tokens) of every prompt with all its complete answers; without those that were not measured."""
    found: dict[str, tuple[float, int]] = {}
    for request in run.requests:
        if not request.complete or request.finish_reason in ("interrupted", "error") or not request.decode:
            continue
        value = amount(run, request)
        if value is not None:
            total, tokens = found.get(request.prompt_id, (0.0, 0))
            found[request.prompt_id] = (total + value, tokens + len(request.decode))
    return found


def _same_work(base: Run, other: Run) -> bool:
    return bool(base.header["workload"]["sha256"] == other.header["workload"]["sha256"])


def _engine(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = run.header.get("engine", {})
    return found
