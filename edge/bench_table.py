"""The table of `edge bench`."""

from __future__ import annotations

from typing import Any

from edge.console import format_number

_HEAD = ("setting", "TPOT", "p95", "mean", "less (95 %)", "hits", "misses", "MB", "overlap", "waiting", "GB/s")
_PARTS = ("head", "block", "shared", "expert")


def table_rows(settings: list[dict[str, Any]]) -> list[list[str]]:
    """A row per setting; a dash where nothing was measured. Times are ms, misses and MB per token."""
    return [[*_HEAD, "of raw", "x floor"], *map(_row, settings)]


def ceiling_line(ceiling: dict[str, Any]) -> str:
    """What the machine could do meanwhile."""
    parts = ", ".join(f"{name} {format_number(ceiling[f'{name}_s'], 1e3)}" for name in _PARTS)
    return f"ceiling: raw reads {format_number(ceiling['raw_read_bytes_per_s'], 1e-9)} GB/s; parts in ms: {parts}"


def tpot_less(setting: dict[str, Any]) -> dict[str, Any] | None:
    """The reduction of the mean TPOT against the first setting; None for that one."""
    found: dict[str, Any] | None = (setting["less_than_first"] or {}).get("tpot_ms")
    return found


def _row(setting: dict[str, Any]) -> list[str]:
    return [
        setting["name"],
        *(format_number(setting["tpot_ms"][name]) for name in ("median", "p95", "mean")),
        _less(tpot_less(setting)),
        _percent(setting["hit_rate"]),
        format_number(setting["misses_per_token"]),
        format_number(setting["bytes_per_token"], 1e-6),
        format_number(setting["overlap"]),
        _percent(setting["waiting_share"]),
        format_number(setting["read_bytes_per_s"], 1e-9),
        _percent(setting["read_share_of_raw"]),
        format_number(setting["over_floor"]),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _less(reduction: dict[str, Any] | None) -> str:
    if reduction is None or reduction["reduction"] is None:
        return "-"
    text = _percent(reduction["reduction"])
    if reduction["low"] is None:
        return text
    return f"{text} ({100 * reduction['low']:.1f} to {100 * reduction['high']:.1f})"
