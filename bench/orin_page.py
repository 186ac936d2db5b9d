"""The pages of bench.orin: tables beside the paper's figures, what they stand on, and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from profiles.forecast import PLAN_CONTEXT, assumptions

if TYPE_CHECKING:
    from bench.orin import Cell, Row
    from profiles.device import Device

# TPOT in ms of DeepSeek-V2-Lite, llama.cpp (-np 1 -n 128 --mmap), Orin NX 16 GB with an NVMe drive at PCIe Gen3 x4:
# "ReMoE: Boosting Expert Reuse through Router Fine-Tuning in Memory-Constrained MoE LLM Inference", arXiv 2605.27081.
PAPER = {"ShareGPT": (554.69, 306.27), "GSM8K": (613.73, 346.04), "HumanEval": (672.68, 337.61)}
SIMULATED, MEASURED = "orin-nx-simulated", "orin-nx-measured"
COMMAND = "python -m bench.orin"
ON_A_BOARD = "python -m bench.orin --measure v2-lite.bundle --router remoe-chat"
_PAGE = Path(__file__).with_name("orin_simulated.md")
_COLOURS = {"base": "#D55E00", "ReMoE": "#0072B2"}  # Okabe and Ito: told apart by every kind of sight


def write(folder: Path, rows: Sequence[Row], device: Device, blob_bytes: int, protocol: tuple[int, int]) -> Path:
    """The simulated page and its picture in `folder`; `protocol`: requests and tokens. Returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{SIMULATED}.md"
    page.write_text(_simulated_text(rows, device, blob_bytes, *protocol), encoding="utf-8")
    draw(folder / f"{SIMULATED}.png", rows)
    return page


def row_json(row: Row) -> dict[str, Any]:
    """A row as plain values."""
    return asdict(row)


def paper_rows() -> list[str]:
    """The published figures as lines of a table with the columns of `_table`."""
    return [
        f"| *published: {name}* | *the page cache* | | *{base:.0f}* | *{tuned:.0f}* | *{base / tuned:.2f} x* |"
        for name, (base, tuned) in PAPER.items()
    ]


def draw(path: Path, rows: Sequence[Row]) -> None:
    """TPOT of both routers over the size of the cache, cold and warm, with the published figures beside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.2), sharey=True, layout="constrained", width_ratios=[3, 3, 1.7])
    for axis, cold in zip(axes, (True, False), strict=False):
        shown = [row for row in rows if row.cold is cold]
        _bars(axis, shown)
        axis.set_title("simulated, cache " + ("cold for each request" if cold else "warm"), fontsize=11)
        axis.set_xlabel("slots per layer (of 64); pale: do not fit in fp16")
    for place, (base, tuned) in enumerate(PAPER.values()):
        axes[2].bar(place - 0.2, base, 0.38, color=_COLOURS["base"])
        axes[2].bar(place + 0.2, tuned, 0.38, color=_COLOURS["ReMoE"])
    axes[2].set_xticks(range(len(PAPER)), list(PAPER), rotation=20)
    axes[2].set_title("published: llama.cpp,\nmmap, page cache", fontsize=11)
    axes[0].set_ylabel("TPOT, ms")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e7eb")
        axis.set_axisbelow(True)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in _COLOURS.values()]
    figure.legend(handles, ["base router", "ReMoE router"], loc="outside lower right", ncols=2, frameon=False)
    figure.suptitle("DeepSeek-V2-Lite on Orin NX 16 GB; bars: a drive of 3.5 GB/s, lines: 2.0 to 6.5 GB/s")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)


def _bars(axis: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        for shift, (router, cell) in zip((-0.2, 0.2), row.cells.items(), strict=True):
            spread = [[cell.tpot_ms - cell.fast_ms], [cell.slow_ms - cell.tpot_ms]]
            axis.bar(place + shift, cell.tpot_ms, 0.38, color=_COLOURS[router], alpha=1 if row.fits else 0.35,
                     yerr=spread, ecolor="#374151", error_kw={"linewidth": 1.1})  # fmt: skip
    axis.set_xticks(range(len(rows)), [str(row.slots) for row in rows])


def _simulated_text(rows: Sequence[Row], device: Device, blob_bytes: int, requests: int, tokens: int) -> str:
    cold = [row for row in rows if row.cold]
    smallest = cold[0].cells
    fewer = 1 - smallest["ReMoE"].misses_per_token / smallest["base"].misses_per_token
    values = {
        "picture": SIMULATED,
        "cold": _table(cold),
        "warm": _table([row for row in rows if not row.cold]),
        "slots": next(row.slots for row in rows if row.name == "what fits"),
        "context": PLAN_CONTEXT,
        "fewer": f"{100 * fewer:.1f}",
        "requests": requests,
        "tokens": tokens,
        "base_hits": f"{smallest['base'].hit_rate:.4f}",
        "tuned_hits": f"{smallest['ReMoE'].hit_rate:.4f}",
        "blob_mb": f"{blob_bytes / 1e6:.1f}",
        "board": _assumed(device),
        "command": COMMAND,
        "measured": MEASURED,
        "on_a_board": ON_A_BOARD,
    }
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(values)


def _table(rows: Sequence[Row]) -> str:
    head = [
        "| cache | slots per layer | hit rate | TPOT, base | TPOT, ReMoE | base / ReMoE |",
        "|---|---|---|---|---|---|",
    ]
    lines = []
    for row in rows:
        base, tuned = row.cells["base"], row.cells["ReMoE"]
        mark = "" if row.fits else " *"
        lines.append(
            f"| {row.name}{mark} | {row.slots} | {base.hit_rate:.3f} to {tuned.hit_rate:.3f} "
            f"| {_range(base)} | {_range(tuned)} | {base.tpot_ms / tuned.tpot_ms:.2f} x |"
        )
    return "\n".join([*head, *lines, *paper_rows()])


def _range(cell: Cell) -> str:
    return f"{cell.tpot_ms:.0f} ({cell.fast_ms:.0f} to {cell.slow_ms:.0f})"


def _assumed(device: Device) -> str:
    return "\n".join(
        f"| {name} | {figure.value / 1e9:.2f}e9 | {figure.mark} | {figure.source} |"
        for name, figure in assumptions(device)
    )
