"""The page: tiles, figures, tables. Everything is inside the one file; every text from outside is escaped."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from profiles.compare import Reduction, compare, differences
from profiles.experts import ExpertUse, expert_use
from profiles.report import figures
from profiles.rundir import Request, Run
from profiles.summary import decode_energy, summarize
from profiles.telemetry.energy import board_rails
from runtime.errors import UsageError

DASH = "–"
_STYLE = """
:root{--ink:#111827;--soft:#6b7280;--line:#e5e7eb;--back:#f9fafb;--accent:#0072B2}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1020px;margin:0 auto;padding:28px 20px 60px}h1{font-size:25px;margin:0 0 4px}
h2{font-size:18px;margin:34px 0 4px}p{margin:4px 0 10px;color:var(--soft)}code{font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(135px,1fr));gap:10px;margin:18px 0}
.tile{background:#fff;border:1px solid var(--line);border-radius:8px;padding:11px 13px}
.tile b{display:block;font-size:21px;font-variant-numeric:tabular-nums;white-space:nowrap}
.tile span{color:var(--soft);font-size:13px}.tile small{color:var(--soft);display:block;font-size:12px}
.card{background:#fff;border:1px solid var(--line);border-radius:8px;padding:10px 14px;overflow-x:auto}
.warn{background:#fffbeb;border:1px solid #fcd34d;border-radius:8px;padding:8px 14px;margin:8px 0;color:#78350f}
svg.figure{width:100%;height:auto;display:block}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:right;padding:4px 9px;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:600}th:first-child,td:first-child{text-align:left}
details{margin-top:12px}pre{white-space:pre-wrap;word-break:break-word;font-size:12px}
"""
_EXPLAIN = {
    "tpot": ("TPOT over the answer", "Line: median over all answers. Band: the middle 80 %."),
    "distribution": ("Distribution of TPOT", "Every decoded token counts once; the slowest 0.5 % are beyond the edge."),
    "parts": ("Where the time goes", "Mean of every part over all decoded tokens; the parts add up to TPOT."),
    "hits": ("Hit rate per layer", "Share of the experts asked for that were in the cache, over decode."),
    "bytes": ("Bytes per token", "Mean over all answers."),
    "heat": ("Misses by layer and place", "Dark: many experts had to be read there."),
    "experts": (
        "Experts by layer",
        "Left: which experts the router asks for; an even colour is an even load. Right: those used before in the same "
        "answer that had to leave the cache and came back: what a larger cache or a router with more reuse removes.",
    ),
    "time": ("Tokens and machine on one time axis", "Both are stamped with the same clock (CLOCK_MONOTONIC)."),
}


def build_page(runs: Sequence[Run], png: Path | None = None) -> str:
    """The HTML of one run, or of several side by side (the first is the base). Raises UsageError for an empty run."""
    for run in runs:
        if not any(request.decode for request in run.requests):
            raise UsageError(f"{run.path}: no token was decoded in this run: there is nothing to report")
    names = run_names(runs)
    drawing = figures.Drawing(png)
    body = _one(runs[0]) if len(runs) == 1 else _several(runs, names)
    body += _figures(drawing, runs, names)
    if len(runs) == 1:
        body += _section("Answers", "One row per request.", _requests_table(runs[0]))
    body += "".join(_repeat(run, name) for run, name in zip(runs, names, strict=True))
    title = escape(" / ".join(names))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


def run_names(runs: Sequence[Run]) -> list[str]:
    """The folders' names; with their parents' where two are the same."""
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.path.resolve().parent.name}/{run.path.resolve().name}" for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path.resolve()) for run in runs]


def _one(run: Run) -> str:
    summary, header = summarize(run), run.header
    engine, protocol = header.get("engine", {}), header["protocol"]
    tpot, energy = summary["tpot_ms"], summary["energy"]
    joules = energy["joules_per_token"]
    tiles = [
        ("TPOT, median", _number(tpot["median"], "ms"), f"p95 {_number(tpot['p95'], 'ms')}"),
        ("speed", _number(summary["tokens_per_s"], "tok/s"), f"mean TPOT {_number(tpot['mean'], 'ms')}"),
        (
            "TTFT, median",
            _number(summary["ttft_ms"]["median"], "ms"),
            f"p95 {_number(summary['ttft_ms']['p95'], 'ms')}",
        ),
        ("hit rate", _number(summary["hit_rate"], "%", 100), f"{_number(summary['misses_per_token'])} misses / token"),
        ("read", _number(summary["bytes_per_token"], "MB", 1e-6), "per token"),
        (
            "energy",
            _number(joules, "J"),
            "per token" if joules is not None else str(energy["why_not"] or "not covered"),
        ),
    ]
    model = escape(str(engine.get("model", Path(header["bundle"]).name)))
    facts = [
        header["machine"]["device"], _mode(header), f"{engine.get('backend', '?')} {engine.get('dtype', '')}",
        _slots(engine),
        f"policy {engine.get('policy', '?')}", f"router {engine.get('router', '?')}", f"{protocol['cache']} cache",
    ]  # fmt: skip
    done = f"{summary['requests']} of {header['requests']} requests"
    work = f"{header['workload']['name']}, protocol {protocol['name']}, {done}"
    return (
        f"<h1>{model}</h1><p>{escape(' · '.join(facts))}<br>{escape(work)}, {escape(header['start_time'])}</p>"
        + "".join(_warning(text) for text in warnings(run, summary))
        + f'<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>'
    )


def warnings(run: Run, summary: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    written = run.summary or {}
    if run.summary is None:
        found.append("This run was cut off: it has no summary. The figures are over what was written until then.")
    elif not written.get("complete", False):
        found.append(f"This run was interrupted after {summary['requests']} of {summary['requests_wanted']} requests.")
    if "Jetson" not in str(run.header["machine"]["device"]):
        found.append("Measured on a computer that is no Jetson board: the times say nothing about a board.")
    if "changed" in run.header["protocol"]["name"]:
        found.append(f"Not the named protocol as it stands: {run.header['protocol']['name']}.")
    energy = summary["energy"]
    if energy["joules_per_token"] is not None and energy["answers_short"]:
        found.append(
            f"{energy['answers_short']} answers took less than three updates of the power sensor (1.29 s): their "
            "energy hangs on one or two readings."
        )
    return found + list(written.get("telemetry_problems", []))


def _several(runs: Sequence[Run], names: Sequence[str]) -> str:
    head = f"<h1>{escape(' against '.join(names))}</h1><p>The first run is the base of every comparison.</p>"
    warned = [warnings(run, summarize(run)) for run in runs]
    for text in dict.fromkeys(text for texts in warned for text in texts):
        told = [name for name, texts in zip(names, warned, strict=True) if text in texts]
        head += _warning(text if len(told) == len(runs) else f"{', '.join(told)}: {text}")
    tables = ""
    for run, name in zip(runs[1:], names[1:], strict=True):
        rows = [["per decoded token", names[0], name, "reduction", "95 % interval"]]
        found = compare(runs[0], run)
        for key, label, unit, factor in (
            ("tpot_ms", "TPOT", "ms", 1.0), ("misses", "misses", "", 1.0), ("bytes", "read", "MB", 1e-6),
            ("joules", "energy", "J", 1.0),
        ):  # fmt: skip
            rows.append(_comparison_row(label, found[key], unit, factor))
        tables += _section(f"{name} against {names[0]}", _how(found["tpot_ms"]), _table(rows))
        other = [[name_, _short(left), _short(right)] for name_, left, right in differences(runs[0], run)]
        text = "A comparison is fair when one thing differs." if other else "Nothing that is recorded differs."
        tables += _section("What differs", text, _table([["setting", names[0], name], *other]) if other else "")
    return head + tables


def _comparison_row(label: str, found: Reduction, unit: str, factor: float) -> list[str]:
    interval = (
        found.why if found.low is None or found.high is None else f"{100 * found.low:.1f} to {100 * found.high:.1f} %"
    )
    change = DASH if found.reduction is None else f"{100 * found.reduction:.1f} %"
    return [label, _number(found.base, unit, factor), _number(found.other, unit, factor), change, interval]


def _how(found: Reduction) -> str:
    kind = "pairs of equal prompts" if found.paired else "prompts, which are not the same in both runs"
    return f"Bootstrap over {found.prompts} {kind}; a negative reduction is an increase."


def _figures(drawing: figures.Drawing, runs: Sequence[Run], names: Sequence[str]) -> str:
    drawn = {
        "tpot": figures.tpot_by_place(drawing, runs, names),
        "parts": figures.parts(drawing, runs, names),
        "distribution": figures.distribution(drawing, runs, names),
        "hits": figures.hit_rates(drawing, runs, names),
        "bytes": figures.bytes_by_place(drawing, runs, names),
    }
    if len(runs) == 1:
        drawn["heat"] = figures.heat_map(drawing, runs[0])
        drawn["time"] = figures.time_axis(drawing, runs[0])
    sections = [_section(*_EXPLAIN[name], svg) for name, svg in drawn.items()]
    maps = [
        _expert_section(drawing, use, f" of {name}" if len(runs) > 1 else "", number)
        for number, (run, name) in enumerate(zip(runs, names, strict=True))
        if (use := expert_use(run)) is not None
    ]
    return "".join(sections[:4] + maps + sections[4:])


def _expert_section(drawing: figures.Drawing, use: ExpertUse, whose: str, number: int) -> str:
    title, text = _EXPLAIN["experts"]
    return _section(title + whose, text, figures.expert_map(drawing, use, f"experts-{number}" if number else "experts"))


def _requests_table(run: Run) -> str:
    rails = board_rails(run.samples)
    rows = [["prompt", "read", "written", "TTFT, ms", "TPOT, ms", "hits, %", "MB / token", "J / token", "end"]]
    for request in run.requests:
        rows.append(_request_row(request, decode_energy(request, run.samples, rails).joules))
    return _table(rows)


def _request_row(request: Request, joules: float | None) -> list[str]:
    decode = request.decode
    hits, misses = (sum(sum(getattr(r, name)) for r in decode) for name in ("hits", "misses"))
    return [
        request.prompt_id, str(request.prompt_tokens), str(len(request.records)),
        _number(request.records[0].total_ms if request.records else None),
        _number(statistics.median(r.total_ms for r in decode) if decode else None),
        _number(100 * hits / (hits + misses) if hits + misses else None),
        _number(sum(r.bytes for r in decode) / len(decode) / 1e6 if decode else None),
        _number(joules / len(decode) if joules is not None and decode else None), request.finish_reason or "cut off",
    ]  # fmt: skip


def _repeat(run: Run, name: str) -> str:
    command = " ".join(str(word) for word in run.header["machine"].get("command", []))
    facts = escape(json.dumps(run.header, indent=1, ensure_ascii=False))
    return (
        f"<details><summary>{escape(name)}: how to repeat it</summary><p><code>{escape(command)}</code></p>"
        f"<pre>{facts}</pre></details>"
    )


def _section(title: str, text: str, content: str) -> str:
    card = f'<div class="card">{content}</div>' if content else ""
    return f"<h2>{escape(title)}</h2><p>{escape(text)}</p>{card}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"


def _warning(text: str) -> str:
    return f'<div class="warn">{escape(text)}</div>'


def _tile(name: str, value: str, small: str) -> str:
    return f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(small)}</small></div>'


def _slots(engine: dict[str, Any]) -> str:
    if engine.get("slots_per_layer"):
        return f"{engine['slots_per_layer']} slots per layer"
    return f"{engine.get('slots', '?')} slots"


def _mode(header: dict[str, Any]) -> str:
    return str(header["machine"].get("power_mode") or "no power mode")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number(value: float | None, unit: str = "", factor: float = 1.0) -> str:
    """Three significant digits and the unit; a dash for what was not measured."""
    if value is None:
        return DASH
    scaled = value * factor
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:.{digits}f} {unit}".rstrip()
