"""The figures of a run as the table that people read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNKNOWN = "-"


def summary_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Rows (name, value) of Engine.report(). What was not measured is a dash, never a zero."""
    tpot, plan = report["tpot_ms"], report["memory_plan_bytes"]["total_bytes"]
    code, peak = report["mapped_code_bytes"], report["peak_rss_bytes"] - report["mapped_code_bytes"]
    cache = f"{report['policy']}, {report['slots']} experts in {_number(report['expert_budget_bytes'], 1e6, 'MB')}"
    return [
        ["tokens", f"{report['prompt_tokens']} read, {len(report['token_ids'])} written ({report['finish_reason']})"],
        ["TTFT", _number(report["ttft_ms"], 1, "ms")],
        ["TPOT", f"median {_number(tpot.get('median'), 1, 'ms')}, p95 {_number(tpot.get('p95'), 1, 'ms')}"],
        ["speed", _number(report["tokens_per_s"], 1, "tokens/s")],
        ["hit rate", f"{_number(report['hit_rate'], 0.01, '%')} ({cache})"],
        ["read", f"{_number(report['expert_bytes_per_token'], 1e6, 'MB per token')}, {_rate(report)}"],
        *_guesses(report),
        ["memory", f"peak {_mb(peak)} of {_mb(plan)} planned, and {_mb(code)} of mapped code"],
    ]


def _guesses(report: Mapping[str, Any]) -> list[list[str]]:
    """Nothing without prefetching."""
    share = _number(report["prefetched_share"], 0.01, "%")
    return [["guesses", f"{share} of the misses were on their way when asked for"]] if report["prefetch"] else []


def _mb(size_bytes: int) -> str:
    return _number(size_bytes, 1e6, "MB")


def _rate(report: Mapping[str, Any]) -> str:
    how = "past the page cache" if report["direct_io"] else "through the page cache"
    return f"{_number(report['read_bytes_per_s'], 1e9, 'GB/s')} {how}"


def _number(value: float | None, unit: float, name: str) -> str:
    """Three significant digits, no exponent."""
    if value is None:
        return f"{UNKNOWN} {name}"
    scaled = value / unit
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:.{digits}f} {name}"
