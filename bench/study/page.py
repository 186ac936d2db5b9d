"""The points of a study as a table in Markdown and a plot: misses against the change of the model's output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

EQUAL = 0.002  # perplexities within this share of each other count as equal
PUBLISHED_EOR_GAIN = 1.26  # arXiv 2605.27081: .273 to .345 for DeepSeek-V2-Lite
PLOTTED = (
    "stock",
    "CE only",
    "ReMoE",
    "cache-prior",
    "miss loss, output anchor",
    "ReMoE, with the prior",
    "all together",
    "all together, output anchor",
)


@dataclass(frozen=True)
class Row:
    """A method at one strength and cache size, averaged over seeds; ratios are to the stock router."""

    method: str
    strength: float
    slots: int
    seeds: int
    perplexity: float
    kl: float
    agreement: float
    eor: float
    misses: float
    optimum: float
    lowest_misses: float
    highest_misses: float


def rows(points: Iterable[dict[str, Any]], slots: int) -> list[Row]:
    """What each method does in a cache of that size: routers tuned for another size are left out."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    sizes = {p["tuned_for"] for p in points} - {0}
    nearest = min(sizes, key=lambda size: abs(size - slots)) if sizes else 0
    for point in points:
        if point["tuned_for"] in (0, nearest):
            groups.setdefault((point["method"], point["strength"]), []).append(point)
    return [_row(method, strength, slots, group) for (method, strength), group in groups.items()]


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
        kl=mean(q["kl"] for q in quality),
        agreement=mean(q["agreement"] for q in quality),
        eor=mean(q["eor"] for q in quality),
        misses=mean(missed),
        optimum=mean(point["optimum"][key] for point in group),
        lowest_misses=min(missed),
        highest_misses=max(missed),
    )


def best_at_equal_perplexity(found: list[Row], limit: float) -> dict[str, Row]:
    """Of each method the strength with the fewest misses whose perplexity is at most `limit` (and EQUAL)."""
    best: dict[str, Row] = {}
    for row in sorted(found, key=lambda row: row.misses):
        if row.perplexity <= limit * (1 + EQUAL):
            best.setdefault(row.method, row)
    return best


def write_page(points: list[dict[str, Any]], top_k: int, out: Path) -> None:
    """study.md and study.png in the folder `out`."""
    sizes = [int(key) for key in points[0]["misses"]]
    tables = [_table(rows(points, size), size, top_k) for size in sizes]
    (out / "study.md").write_text("\n".join(tables), encoding="utf-8")
    _plot(points, sizes, top_k, out / "study.png")


def _table(found: list[Row], slots: int, top_k: int) -> str:
    stock = next(row for row in found if row.method == "stock")
    lines = [
        f"### {slots} slots per layer ({slots / top_k:.1f} K)\n",
        "| method | strength | perplexity | KL to stock | same best word | EOR | misses per layer and token | "
        "of the stock's | Belady's share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        spread = f" ({row.lowest_misses:.2f} to {row.highest_misses:.2f})" if row.seeds > 1 else ""
        cells = [
            row.method,
            f"{row.strength:g}",
            f"{row.perplexity:.2f} ({_percent(row.perplexity, stock.perplexity)})",
            f"{row.kl:.4f}",
            f"{row.agreement:.1%}",
            f"{row.eor:.3f} ({_percent(row.eor, stock.eor)})",
            f"{row.misses:.3f}{spread}",
            _percent(row.misses, stock.misses),
            _share(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    published = [row for row in found if row.method == "ReMoE" and row.eor >= PUBLISHED_EOR_GAIN * stock.eor]
    if published:
        lines += ["", *_verdict(found, min(published, key=lambda row: row.strength), stock)]
    return "\n".join(lines) + "\n"


def _verdict(found: list[Row], reference: Row, stock: Row) -> list[str]:
    """The comparison at the perplexity of ReMoE where it does what is published: the weakest with that much reuse."""
    limit = max(reference.perplexity, stock.perplexity)
    best = best_at_equal_perplexity(found, limit)
    saved = stock.misses - reference.misses
    lines = [
        f"ReMoE has at least the published gain of EOR from strength {reference.strength:g} on. Fewest misses of each "
        f"method at its perplexity, {limit:.2f} (+{EQUAL:.1%}), or below:",
        "",
    ]
    for name, row in best.items():
        factor = f", {(stock.misses - row.misses) / saved:.1f} x ReMoE's saving" if saved > 0 else ""
        lines.append(f"* {name} ({row.strength:g}): {_percent(row.misses, stock.misses)}{factor}")
    return lines


def _percent(value: float, base: float) -> str:
    return f"{value / base - 1:+.1%}"


def _share(row: Row) -> str:
    return f"{row.optimum / row.misses:.0%}" if row.misses else "-"


def _plot(points: list[dict[str, Any]], sizes: list[int], top_k: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(3, len(sizes))
    lines = -(-len(sizes) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.4 * columns, 3.8 * lines), squeeze=False)
    for axis in axes.flat[len(sizes) :]:
        axis.axis("off")
    for axis, size in zip(axes.flat, sizes, strict=False):
        found = rows(points, size)
        for number, name in enumerate(PLOTTED):
            line = sorted((row.kl, row.misses) for row in found if row.method == name)
            if line:
                style = "o" if len(line) == 1 else "o-"
                axis.plot(*zip(*line, strict=True), style, ms=4, lw=1.2, label=name, color=f"C{number}")
        axis.set(title=f"{size} slots ({size / top_k:.1f} K)", xlim=(-0.002, None), ylim=(0, None))
        axis.set(xlabel="KL to the stock model, nats per token", ylabel="misses per layer and token")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=9, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
