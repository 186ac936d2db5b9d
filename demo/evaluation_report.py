"""The results of demo.evaluate as Markdown tables and as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def markdown(found: dict[str, Any]) -> str:
    """Tables for a model card: perplexity over top-k, routing, load."""
    own = str(found["top_k"])
    ks = list(next(iter(found["sets"].values()))["perplexity"])
    dense = any("dense_perplexity" in result for result in found["sets"].values())
    head = ["text", "tokens", *(["dense"] if dense else []), *(f"top-{k}" for k in ks)]
    head += [f"top-{own} / dense"] if dense else []
    lines = [f"Perplexity ({found['settings']['split']} parts, {found['settings']['length']}-token rows, fp32)", ""]
    lines += _table(head, [_perplexity_row(name, result, own, dense) for name, result in found["sets"].items()])
    head = ["text", f"EOR at top-{own}", "by chance", "ratio", "by layer"]
    random = all("random_routers" in result for result in found["sets"].values())
    head += ["perplexity, trained routers", "random routers", "EOR, random"] if random else []
    lines += ["", f"Routing ({found['experts']} experts per layer)", ""]
    lines += _table(head, [_routing_row(name, result, own, random) for name, result in found["sets"].items()])
    load = found["load"]
    lines += ["", f"Load per expert, of its layer's mean: {load['least']:.2f} to {load['most']:.2f}."]
    return "\n".join(lines) + "\n"


def _perplexity_row(name: str, result: dict[str, Any], own: str, dense: bool) -> list[str]:
    row = [name, str(result["tokens"])]
    row += [f"{result['dense_perplexity']:.1f}"] if dense else []
    row += [f"{value:.1f}" for value in result["perplexity"].values()]
    return row + ([f"{result['perplexity'][own] / result['dense_perplexity']:.2f}"] if dense else [])


def _routing_row(name: str, result: dict[str, Any], own: str, random: bool) -> list[str]:
    routing = result["routing"]
    layers = routing["overlap_per_layer"]
    row = [
        name,
        f"{routing['overlap']:.3f}",
        f"{routing['chance']:.3f}",
        f"{routing['overlap'] / routing['chance']:.2f}",
    ]
    row.append(f"{min(layers):.2f} to {max(layers):.2f}")
    if random:
        others = result["random_routers"]
        row += [f"{result['perplexity'][own]:.1f}", ", ".join(f"{other['perplexity']:.1f}" for other in others)]
        row.append(", ".join(f"{other['overlap']:.3f}" for other in others))
    return row


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def draw(found: dict[str, Any], path: Path) -> None:
    """Perplexity over top-k, EOR by layer, trained beside random routers, load per expert: one PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), constrained_layout=True)
    _draw_perplexity(axes[0][0], found)
    _draw_overlap(axes[0][1], found)
    _draw_routers(axes[1][0], found)
    _draw_load(axes[1][1], found)
    figure.suptitle(f"{found['checkpoint']}: {found['experts']} experts, top-{found['top_k']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_perplexity(axes: Any, found: dict[str, Any]) -> None:
    from matplotlib.ticker import ScalarFormatter

    for index, (name, result) in enumerate(found["sets"].items()):
        ks = [int(k) for k in result["perplexity"]]
        axes.plot(ks, list(result["perplexity"].values()), "o-", color=f"C{index}", label=name)
        if "dense_perplexity" in result:
            axes.axhline(result["dense_perplexity"], color=f"C{index}", linestyle=":", linewidth=1)
    dense = " (dotted: dense)" if any("dense_perplexity" in result for result in found["sets"].values()) else ""
    axes.set(xlabel="experts per token", ylabel=f"perplexity{dense}", yscale="log", title="Quality over top-k")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.legend()


def _draw_overlap(axes: Any, found: dict[str, Any]) -> None:
    for name, result in found["sets"].items():
        axes.plot(result["routing"]["overlap_per_layer"], "o-", markersize=3, label=name)
    chance = found["top_k"] / found["experts"]
    axes.axhline(chance, color="black", linestyle="--", linewidth=1, label="chance")
    axes.set(xlabel="layer", ylabel="EOR", title="Experts shared with the token before", ylim=(0, None))
    axes.legend()


def _draw_routers(axes: Any, found: dict[str, Any]) -> None:
    names = list(found["sets"])
    own = str(found["top_k"])
    axes.bar(
        [i - 0.2 for i in range(len(names))],
        [found["sets"][n]["perplexity"][own] for n in names],
        0.38,
        label="trained",
    )
    random = [[other["perplexity"] for other in found["sets"][n].get("random_routers", [])] for n in names]
    if all(random):
        means = [sum(values) / len(values) for values in random]
        axes.bar([i + 0.2 for i in range(len(names))], means, 0.38, label="random, mean of seeds")
    axes.set(ylabel="perplexity", title=f"Routers at top-{own}")
    axes.set_xticks(range(len(names)), names)
    axes.legend()


def _draw_load(axes: Any, found: dict[str, Any]) -> None:
    for shares in found["load"]["per_layer"]:
        axes.plot(shares, color="C0", alpha=0.4, linewidth=1)
    axes.axhline(0.1, color="black", linestyle="--", linewidth=1, label="0.1 of the mean")
    axes.set(xlabel="expert, least used first (a line per layer)", ylabel="load / mean", title="Load", ylim=(0, None))
    axes.legend()
