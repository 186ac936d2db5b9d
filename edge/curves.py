"""The curves of `edge simulate`: hit rate and misses over the size of the cache, one line per policy and trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import UsageError

if TYPE_CHECKING:
    from edge.simulate import Row

# Okabe and Ito: told apart by every kind of sight. The optimum is a bound, so it is grey and dashed.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = "osv^Dx"


def check_plot(path: Path) -> None:
    """Raises UsageError before any work is done when the picture could not be written."""
    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"--plot {path}: expected a file that ends in .svg or .png")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError('--plot needs matplotlib: pip install "remoe-edge[bench]"') from None


def plot_curves(rows: Sequence[Row], path: Path, scope: str) -> None:
    """Write the picture. Raises UsageError when it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rate, misses) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    traces = list(dict.fromkeys(row.trace for row in rows))
    policies = list(dict.fromkeys(row.policy for row in rows))
    for number, trace in enumerate(traces):
        for index, policy in enumerate(policies):
            line = [row for row in rows if (row.trace, row.policy) == (trace, policy)]
            if not line:
                continue
            bound = policy == "belady"
            style = {
                "color": "#6b7280" if bound else _COLOURS[index % len(_COLOURS)],
                "linestyle": "--" if bound else "-",
                "marker": _MARKERS[number % len(_MARKERS)],
                "label": policy if len(traces) == 1 else f"{policy}, {trace}",
            }
            slots = [row.slots for row in line]
            rate.plot(slots, [row.result.unique_hit_rate for row in line], **style)
            misses.plot(slots, [row.result.misses / row.result.decode_tokens for row in line], **style)
    for axes, name in ((rate, "hit rate"), (misses, "misses per token")):
        axes.set_xlabel("slots per layer" if scope == "layer" else "slots")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(color="#e5e7eb")
    rate.legend(frameon=False, fontsize=8)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"--plot {path}: {error.strerror}") from None
    finally:
        pyplot.close(figure)
