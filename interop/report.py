"""Results as a table, and what does not fit into one."""

from __future__ import annotations

from typing import Any

_COLUMNS = {
    "routing": "routing equal",
    "routing_stock": "to stock",
    "mean_score_gap": "log-p gap",
    "best": "best token",
    "answers": "answers",
    "answers_stock": "to stock",
}
_HIDDEN = {*_COLUMNS, "status", "reason", "complaints", "versions", "seconds", "trace", "choices", "answer_tokens"}


def table(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row per check; what did not run has its reason below the table (`remarks`)."""
    rows = [["engine", *_COLUMNS.values(), "s", "result"]]
    for name, result in results.items():
        figures = [_figure(column, result.get(column)) for column in _COLUMNS]
        rows.append([name, *figures, f"{result['seconds']:.0f}", result["status"]])
    return rows


def remarks(results: dict[str, dict[str, Any]]) -> list[str]:
    """Reasons, complaints, and figures that have no column."""
    lines = []
    for name, result in results.items():
        if result["status"] == "not run":
            lines.append(f"{name}: not run: {result['reason']}")
        lines += [f"{name}: {complaint}" for complaint in result.get("complaints", ())]
        extra = [f"{key} {value}" for key, value in result.items() if key not in _HIDDEN]
        versions = [f"{key} {value}" for key, value in result.get("versions", {}).items()]
        if extra or versions:
            lines.append(f"{name}: {', '.join([*extra, *versions])}")
    return lines


def _figure(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1e}" if column.endswith("gap") else f"{100 * value:.2f} %"
