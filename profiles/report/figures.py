"""The figures of a report, as SVG text. Colours are those of Okabe and Ito, told apart by every kind of sight."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from profiles.experts import ExpertUse
from profiles.report.lines import telemetry_rows
from profiles.rundir import Run
from profiles.summary import PARTS, layer_hit_rates
from runtime.errors import UsageError
from runtime.records import TokenRecord, percentile

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#6b7280",
)  # fmt: skip
RUN_COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
PART_COLOURS = {"dense_ms": BLUE, "expert_ms": SKY, "routing_ms": GREEN, "wait_ms": RED, "other_ms": GREY}
PART_NAMES = {
    "dense_ms": "dense blocks and head",
    "expert_ms": "experts, computing",
    "routing_ms": "routing",
    "wait_ms": "waiting for the disk",
    "other_ms": "other",
}
_MANY_POINTS = 2000  # more than that are drawn as pixels inside the SVG
_WIDTH = 9.0


class Drawing:
    """Draws with matplotlib, keeps each figure under its name. `png` also saves them as PNG files there."""

    def __init__(self, png: Path | None = None) -> None:
        """Raises UsageError when matplotlib is not installed."""
        try:
            import matplotlib
        except ImportError:
            raise UsageError('a report needs matplotlib: pip install "remoe-edge[bench]", or make report') from None
        matplotlib.use("Agg")
        from matplotlib import pyplot

        self._pyplot, self._png = pyplot, png
        pyplot.rcParams.update({
            "svg.fonttype": "none", "svg.hashsalt": "remoe-edge", "font.family": "sans-serif", "font.size": 10,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e5e7eb",
            "axes.axisbelow": True, "axes.edgecolor": "#9ca3af", "axes.labelcolor": "#374151", "legend.frameon": False,
            "xtick.color": "#4b5563", "ytick.color": "#4b5563", "figure.dpi": 110,
        })  # fmt: skip

    def figure(self, rows: int = 1, height: float = 3.0, columns: int = 1, **options: Any) -> tuple[Any, Any]:
        """A figure and its axes."""
        figure, axes = self._pyplot.subplots(rows, columns, figsize=(_WIDTH, height), layout="constrained", **options)
        return figure, axes

    def svg(self, figure: Any, name: str) -> str:
        """The figure as an <svg> element whose ids meet no other figure's; it is closed."""
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        if self._png is not None:
            try:
                self._png.mkdir(parents=True, exist_ok=True)
                figure.savefig(self._png / f"{name}.png", dpi=160)
            except OSError as error:
                raise UsageError(f"--png {self._png}: {error.strerror}") from None
        self._pyplot.close(figure)
        body = text.getvalue()
        body = body[body.index("<svg") :]
        body = re.sub(r'(\bid="|"#|\(#)', rf"\g<1>{name}-", body)
        return body.replace("<svg ", '<svg role="img" class="figure" ', 1)


def tpot_by_place(drawing: Drawing, runs: Sequence[Run], names: Sequence[str]) -> str:
    """Median TPOT by the token's place in its answer, with the middle 80 %."""
    figure, axes = drawing.figure(height=3.2)
    for run, name, colour in zip(runs, names, RUN_COLOURS, strict=False):
        by_place = _by_place(run)
        places = sorted(by_place)
        columns = [sorted(r.total_ms for r in by_place[place]) for place in places]
        axes.plot(places, [statistics.median(c) for c in columns], color=colour, linewidth=1.8, label=name)
        if len(run.requests) > 2:
            low, high = ([percentile(c, p) for c in columns] for p in (10, 90))
            axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set(xlabel="place of the token in its answer (0 is the prefill's)", ylabel="TPOT, ms")
    axes.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.legend()
    return drawing.svg(figure, "tpot")


def distribution(drawing: Drawing, runs: Sequence[Run], names: Sequence[str]) -> str:
    """Histogram of TPOT, cut above at the 99.5th percentile, with medians."""
    import numpy as np

    figure, axes = drawing.figure(height=2.6)
    columns = [sorted(r.total_ms for request in run.requests for r in request.decode) for run in runs]
    most = max(percentile(column, 99.5) for column in columns if column)
    count = min(60, max(12, round(1.5 * min(map(len, columns)) ** 0.5)))
    bins = np.linspace(min(c[0] for c in columns if c), most, count)
    for column, name, colour in zip(columns, names, RUN_COLOURS, strict=False):
        middle = statistics.median(column)
        weights = [100 / len(column)] * len(column)
        label = f"{name}, median {middle:.1f} ms"
        axes.hist(column, bins=bins, weights=weights, color=colour, alpha=0.55, label=label)
        axes.axvline(middle, color=colour, linewidth=1.4)
    axes.set(xlabel="TPOT, ms (lines: medians)", ylabel="% of the tokens")
    axes.legend()
    return drawing.svg(figure, "distribution")


def parts(drawing: Drawing, runs: Sequence[Run], names: Sequence[str]) -> str:
    """Where the time of a mean token goes."""
    figure, axes = drawing.figure(height=1.2 + 0.45 * len(runs))
    for row, run in enumerate(runs):
        decode = [r for request in run.requests for r in request.decode]
        left = 0.0
        for part in sorted(PARTS, key=list(PART_NAMES).index):
            mean = statistics.fmean(getattr(r, part) for r in decode)
            axes.barh(row, mean, left=left, color=PART_COLOURS[part], label=PART_NAMES[part] if not row else None)
            left += mean
        for text, at in _labels(decode, left):
            axes.text(at, row, text, ha="center", va="center", color="white", fontsize=9)
    axes.set_yticks(range(len(runs)), names)
    axes.set(xlabel="ms of a mean token")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=5, fontsize=9)
    return drawing.svg(figure, "parts")


def hit_rates(drawing: Drawing, runs: Sequence[Run], names: Sequence[str]) -> str:
    """Hit rate of each layer with experts."""
    figure, axes = drawing.figure(height=2.6)
    width = 0.8 / len(runs)
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        rates = layer_hit_rates([r for request in run.requests for r in request.decode])
        places = [layer + (number - (len(runs) - 1) / 2) * width for layer in range(len(rates))]
        heights = [100 * (rate or 0) for rate in rates]
        axes.bar(places, heights, width=width, color=RUN_COLOURS[number % len(RUN_COLOURS)], label=name)
    axes.set(xlabel="layer with experts", ylabel="hits, %", ylim=(0, 100))
    axes.grid(axis="x", visible=False)
    if len(runs) > 1:
        figure.legend(loc="outside upper right", ncols=len(runs), fontsize=9)
    return drawing.svg(figure, "hits")


def bytes_by_place(drawing: Drawing, runs: Sequence[Run], names: Sequence[str]) -> str:
    """Mean megabytes read per token, by its place."""
    figure, axes = drawing.figure(height=2.4)
    for run, name, colour in zip(runs, names, RUN_COLOURS, strict=False):
        by_place = _by_place(run)
        places = sorted(by_place)
        means = [statistics.fmean(r.bytes for r in by_place[place]) / 1e6 for place in places]
        axes.plot(places, means, color=colour, linewidth=1.6, label=name)
    axes.set(xlabel="place of the token in its answer", ylabel="MB read")
    axes.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.legend()
    return drawing.svg(figure, "bytes")


def heat_map(drawing: Drawing, run: Run) -> str:
    """Misses per token, layer by place in the answer: where and when the cache is too small."""
    import numpy as np

    by_place = _by_place(run)
    places = sorted(by_place)
    misses = np.array([np.mean([r.misses for r in by_place[place]], axis=0) for place in places]).T
    figure, axes = drawing.figure(height=2.8)
    box = (places[0] - 0.5, places[-1] + 0.5, len(misses) - 0.5, -0.5)
    image = axes.imshow(misses, aspect="auto", cmap="magma_r", vmin=0, interpolation="nearest", extent=box)
    axes.set(xlabel="place of the token in its answer", ylabel="layer with experts")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="misses per token", pad=0.01)
    return drawing.svg(figure, "heat")


def expert_map(drawing: Drawing, use: ExpertUse, name: str = "experts") -> str:
    """How often each expert of each layer was asked for, and read again, per hundred decoded tokens."""
    layers, experts = use.asked.shape
    figure, axes = drawing.figure(height=1.0 + 0.07 * max(20, layers), columns=2)
    parts = (("asked for", use.asked, "viridis_r"), ("read again in the same answer", use.read_again, "magma_r"))
    for axis, (title, counts, colours) in zip(axes, parts, strict=True):
        shares = 100 * counts / max(1, use.tokens)
        image = axis.imshow(shares, aspect="auto", cmap=colours, vmin=0, vmax=max(1.0, shares.max()),
                            interpolation="nearest", extent=(-0.5, experts - 0.5, layers - 0.5, -0.5))  # fmt: skip
        axis.set(xlabel="expert", title=title)
        axis.title.set_fontsize(10)
        axis.grid(visible=False)
        figure.colorbar(image, ax=axis, label="per 100 tokens", pad=0.01)
    axes[0].set_ylabel("layer with experts")
    return drawing.svg(figure, name)


def time_axis(drawing: Drawing, run: Run) -> str:
    """TPOT and what the machine said, over the seconds of the run; rows without a value are left out."""
    begin = run.requests[0].start_ns
    decode = [r for request in run.requests for r in request.decode]
    rows = telemetry_rows(run)
    figure, axes = drawing.figure(1 + len(rows), height=1.6 + 1.35 * len(rows), sharex=True, squeeze=False)
    top = axes[0][0]
    top.plot([(r.time_ns - begin) / 1e9 for r in decode], [r.total_ms for r in decode], ".", color=BLUE, markersize=2.5,
             rasterized=len(decode) > _MANY_POINTS)  # fmt: skip
    top.set_ylabel("TPOT, ms")
    top.set_ylim(bottom=0)
    for request in run.requests:
        for axis in axes[:, 0]:
            axis.axvline((request.start_ns - begin) / 1e9, color="#9ca3af", linewidth=0.8, linestyle="--", zorder=0)
    for axis, (label, lines) in zip(axes[1:, 0], rows, strict=True):
        for colour, (name, points) in zip(RUN_COLOURS, lines.items(), strict=False):
            axis.plot(
                [(t - begin) / 1e9 for t, _ in points], [v for _, v in points], color=colour, linewidth=1.1, label=name
            )
        axis.set_ylabel(label)
        if len(lines) > 1:
            low, high = axis.get_ylim()
            axis.set_ylim(low, high + 0.4 * (high - low))  # room for the legend
            axis.legend(fontsize=8, ncols=3, loc="upper right")
    axes[-1][0].set_xlabel("seconds since the first request (dashed: a request begins)")
    return drawing.svg(figure, "time")


def _by_place(run: Run) -> dict[int, list[TokenRecord]]:
    found: dict[int, list[TokenRecord]] = {}
    for request in run.requests:
        for record in request.decode:
            found.setdefault(record.index, []).append(record)
    return found


def _labels(decode: Sequence[TokenRecord], total: float) -> list[tuple[str, float]]:
    """(text, where) for parts that are wide enough for a number."""
    labels, left = [], 0.0
    for part in sorted(PARTS, key=list(PART_NAMES).index):
        mean = statistics.fmean(getattr(r, part) for r in decode)
        if mean > 0.05 * total:
            labels.append((f"{mean:.1f}", left + mean / 2))
        left += mean
    return labels
