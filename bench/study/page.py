"""The points of a study as tables in Markdown and a plot: misses against what they cost in the model's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

PUBLISHED_EOR_GAIN = 1.26  # arXiv 2605.27081: .273 to .345 for DeepSeek-V2-Lite
MOST_PERPLEXITY = 1.01  # of the stock's, for a method that is worth its reads
TRAINING_FREE = {  # and what they are at strength 0
    "cache-prior": "stock",
    "cache-prior, gate-aware cache": "gate-aware cache",
    "by energy": "stock",
    "by energy, gate-aware cache": "gate-aware cache",
}
DECIDING = ("CE only", "ReMoE", "ReMoE without Trust", *TRAINING_FREE)  # full lines in the plot, others are dashed
_LEGEND_COLUMNS = 6
RULE = """Read off where a method costs as much as ReMoE does: its points, joined by straight lines in the order of
their strengths (those of the rules begin at strength 0), give the fewest misses at a cost of at most that. Nothing is
read beyond the points. In parentheses the range over seeds, then the saving as a multiple of ReMoE's.
"""


@dataclass(frozen=True)
class Row:
    """A method at one strength and cache size, averaged over seeds; ratios are to the stock router."""

    method: str
    strength: float
    slots: int
    seeds: int
    perplexity: float
    perplexity_error: float  # of a single seed's, as a share
    kl: float
    agreement: float
    eor: float
    misses: float
    optimum: float
    lowest_misses: float
    highest_misses: float


def rows(points: Iterable[dict[str, Any]], slots: int) -> list[Row]:
    """What each method does in a cache of that size, by method and strength: routers tuned for another size are left
    out.
    """
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    sizes = {p["tuned_for"] for p in points} - {0}
    nearest = min(sizes, key=lambda size: abs(size - slots)) if sizes else 0
    for point in points:
        if point["tuned_for"] in (0, nearest):
            groups.setdefault((point["method"], point["strength"]), []).append(point)
    places = list(dict.fromkeys(method for method, _ in groups))
    ordered = sorted(groups.items(), key=lambda item: (places.index(item[0][0]), item[0][1]))
    return [_row(method, strength, slots, group) for (method, strength), group in ordered]


def _row(method: str, strength: float, slots: int, group: list[dict[str, Any]]) -> Row:
    key = str(slots)
    quality = [point["quality"][key] for point in group]
    missed = [point["misses"][key] for point in group]
    return Row(
        method=method,
        strength=strength,
        slots=slots,
        seeds=len(group),
        perplexity=mean(q["perplexity"] for q in quality),
        perplexity_error=mean(q["perplexity_error"] for q in quality),
        kl=mean(q["kl"] for q in quality),
        agreement=mean(q["agreement"] for q in quality),
        eor=mean(q["eor"] for q in quality),
        misses=mean(missed),
        optimum=mean(point["optimum"][key] for point in group),
        lowest_misses=min(missed),
        highest_misses=max(missed),
    )


def fewest_misses(line: Sequence[Row], cost: Callable[[Row], float], limit: float) -> float | None:
    """On the straight lines between the rows, in their order, where `cost` is at most `limit`; None if it never is."""
    found = [row.misses for row in line if cost(row) <= limit]
    for one, two in pairwise(line):
        if (cost(one) - limit) * (cost(two) - limit) < 0:
            share = (limit - cost(one)) / (cost(two) - cost(one))
            found.append(one.misses + share * (two.misses - one.misses))
    return min(found, default=None)


def write_page(points: list[dict[str, Any]], top_k: int, miss_bytes: int, out: Path) -> None:
    """study.md and study.png in the folder `out`. `miss_bytes`: read per token where every layer misses one expert."""
    sizes = [int(key) for key in points[0]["misses"]]
    parts = [*_verdicts(points, sizes, top_k), *(_table(rows(points, size), size, top_k, miss_bytes) for size in sizes)]
    (out / "study.md").write_text("\n".join(parts), encoding="utf-8")
    _plot(points, sizes, top_k, out / "study.png")


def _line(found: Iterable[Row], name: str) -> list[Row]:
    """The method's rows by strength, from what it is at strength 0 on where that can be."""
    return sorted(
        (row for row in found if row.method in (name, TRAINING_FREE.get(name))),
        key=lambda row: row.strength,
    )


def _reference(found: list[Row]) -> Row | None:
    """ReMoE where it does what is published, at the weakest strength with that much reuse; where none has it, at the
    strongest that costs no more perplexity than MOST_PERPLEXITY.
    """
    stock = next(row for row in found if row.method == "stock")
    tried = sorted((row for row in found if row.method == "ReMoE"), key=lambda row: row.strength)
    published = [row for row in tried if row.eor >= PUBLISHED_EOR_GAIN * stock.eor]
    affordable = [row for row in tried if row.perplexity <= MOST_PERPLEXITY * stock.perplexity]
    return next(iter(published or affordable[::-1]), None)


def _introduction(reference: Row, stock: Row) -> str:
    gain = f"raises EOR by {reference.eor / stock.eor - 1:.1%} there"
    if reference.eor >= PUBLISHED_EOR_GAIN * stock.eor:
        return f"ReMoE has at least the published gain of EOR from strength {reference.strength:g} on: it {gain}.\n"
    return (
        f"No strength of ReMoE that was tried has the published gain of EOR. It stands here at {reference.strength:g}, "
        f"the strongest that costs at most {MOST_PERPLEXITY - 1:.0%} of perplexity; it {gain}.\n"
    )


def _verdicts(points: list[dict[str, Any]], sizes: list[int], top_k: int) -> list[str]:
    """Every method at ReMoE's perplexity and at its KL, in every cache."""
    found = rows(points, sizes[0])
    reference, stock = _reference(found), next(row for row in found if row.method == "stock")
    if reference is None:
        return ["ReMoE was not run, or costs too much at every strength that was tried.\n"]
    names = list(dict.fromkeys(p["method"] for p in points if p["method"] != "stock"))
    lines = [_introduction(reference, stock), RULE]
    costs: list[tuple[str, Callable[[Row], float]]] = [
        (f"perplexity, {reference.perplexity:.2f}", lambda row: row.perplexity),
        (f"KL, {reference.kl:.4f}", lambda row: row.kl),
    ]
    for title, cost in costs:
        heads = " | ".join(f"{size} slots ({size / top_k:.1f} K)" for size in sizes)
        lines += [f"### At ReMoE's {title}: misses, of the stock's\n", f"| method | {heads} |"]
        lines.append("|---" * (len(sizes) + 1) + "|")
        for name in names:
            cells = [_cell(points, size, name, cost, cost(reference)) for size in sizes]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _cell(points: list[dict[str, Any]], size: int, name: str, cost: Callable[[Row], float], limit: float) -> str:
    found = rows(points, size)
    stock, reference = next(row for row in found if row.method == "stock"), _reference(found)
    value = fewest_misses(_line(found, name), cost, limit)
    if value is None or reference is None:
        return "-"
    seeds = sorted({p["seed"] for p in points if p["method"] == name})
    single = [
        fewest_misses(_line(rows([p for p in points if p["seed"] == seed or p["method"] == "stock"], size), name),
                      cost, limit)
        for seed in seeds
    ]  # fmt: skip
    reached = [v for v in single if v is not None]
    spread = f" ({_percent(max(reached), stock.misses)} to {_percent(min(reached), stock.misses)})"
    saved = stock.misses - reference.misses
    factor = f", {(stock.misses - value) / saved:.1f} x" if saved > 0 else ""
    return _percent(value, stock.misses) + (spread if len(reached) > 1 else "") + factor


def _table(found: list[Row], slots: int, top_k: int, miss_bytes: int) -> str:
    stock = next(row for row in found if row.method == "stock")
    lines = [
        f"### {slots} slots per layer ({slots / top_k:.1f} K)\n",
        "| method | strength | perplexity | KL to stock | same best word | EOR | misses per layer and token | "
        "of the stock's | MB per token | Belady's share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        spread = f" ({row.lowest_misses:.2f} to {row.highest_misses:.2f})" if row.seeds > 1 else ""
        cells = [
            row.method,
            f"{row.strength:g}",
            f"{row.perplexity:.2f} ({_change(row, stock)})",
            f"{row.kl:.4f}",
            f"{row.agreement:.1%}",
            f"{row.eor:.3f} ({_percent(row.eor, stock.eor)})",
            f"{row.misses:.3f}{spread}",
            _percent(row.misses, stock.misses),
            f"{row.misses * miss_bytes / 1e6:.3g}",
            _share(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(value: float, base: float) -> str:
    return f"{value / base - 1:+.1%}"


def _change(row: Row, stock: Row) -> str:
    """Of perplexity, with its standard error."""
    change = 100 * (row.perplexity / stock.perplexity - 1)
    return f"{change:+.2f} ± {100 * row.perplexity_error:.2f}%" if row.perplexity_error else f"{change:+.1f}%"


def _share(row: Row) -> str:
    return f"{row.optimum / row.misses:.0%}" if row.misses else "-"


def _plot(points: list[dict[str, Any]], sizes: list[int], top_k: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    costs: list[tuple[str, Callable[[Row], float]]] = [
        ("perplexity, more than stock's in %", lambda row: row.perplexity),
        ("KL to the stock model, nats per token", lambda row: row.kl),
    ]
    names = list(dict.fromkeys(p["method"] for p in points if p["method"] != "stock"))
    colours = plt.get_cmap("tab20")
    figure, axes = plt.subplots(2, len(sizes), figsize=(3.7 * len(sizes), 7.4), squeeze=False, sharey="col")
    for column, size in zip(axes.T, sizes, strict=True):
        found = rows(points, size)
        stock = next(row for row in found if row.method == "stock")
        reference = _reference(found)
        for axis, (label, cost) in zip(column, costs, strict=True):
            scale = 100 / stock.perplexity if label.startswith("perplexity") else 1.0

            def x(row: Row, cost: Callable[[Row], float] = cost, scale: float = scale, zero: Row = stock) -> float:
                return (cost(row) - cost(zero)) * scale

            for number, name in enumerate(names):
                line = [(x(row), row.misses) for row in _line(found, name)]
                style = "o-" if name in DECIDING else ".--"
                axis.plot(*zip(*line, strict=True), style, ms=4, lw=1.2, label=name, color=colours(number))
            axis.plot(x(stock), stock.misses, "k*", ms=9, label="stock")
            if reference is not None:
                axis.axvline(x(reference), color="grey", lw=0.8, ls=":")
                axis.set_xlim(right=3.5 * x(reference))
            axis.set(ylim=(0, None), xlabel=label)
            axis.grid(alpha=0.3)
        column[0].set_title(f"{size} slots ({size / top_k:.1f} K)")
    for row in axes:
        row[0].set_ylabel("misses per layer and token")
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=9, loc="lower center", ncols=_LEGEND_COLUMNS)
    figure.tight_layout(rect=(0, 0.04 + 0.02 * (len(names) // _LEGEND_COLUMNS), 1, 1))
    figure.savefig(path, dpi=90)
    plt.close(figure)
