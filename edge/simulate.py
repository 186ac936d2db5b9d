"""`edge simulate`: recorded routing through caches of any size and policy, without a model and within seconds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge import console
from edge.curves import check_plot, plot_curves
from edge.options import add_routing_arguments, engine_options
from remoe.simulate import BELADY, SIMULATED, Result, Setting, share_of_optimum, simulate
from remoe.trace import Trace
from runtime.errors import UsageError
from runtime.policies import GATE

if TYPE_CHECKING:
    from profiles.predict import Prediction
    from runtime.cache_prior import CachePrior

NAME = "simulate"
HELP = "replay recorded routing through caches of any size and policy"
EXAMPLES = """
edge simulate chats.trace.safetensors
edge simulate stock.trace.safetensors tuned.trace.safetensors --slots 8 16 30 --policy lru belady --device orin-nx-16gb
edge simulate chats.trace.safetensors --device orin-nx-16gb --model qwen.bundle
edge simulate chats.trace.safetensors --routing cache-prior --prior-strength 0.2 --slots 16
edge simulate chats.trace.safetensors --scope shared --slots 416 832 --cache warm --plot curves.svg
"""
_NEAR_FIT = 0.9  # of all experts
_TIGHT = 1.3  # times top-k


@dataclass(frozen=True)
class Row:
    """One simulated cache: `slots` per layer or in all, `share` of its misses that the optimum has as well."""

    trace: str
    routing: str
    policy: str
    slots: int
    result: Result
    share: float
    drive_ms: float | None
    tpot: Prediction | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `edge simulate`."""
    parser.add_argument("traces", metavar="TRACE", type=Path, nargs="+", help="files made by edge trace")
    group = parser.add_argument_group("cache")
    add = group.add_argument
    add("--policy", metavar="P", nargs="+",
        help=f"{', '.join(SIMULATED)} (default: all; gate needs a trace with logits)")  # fmt: skip
    add("--slots", metavar="N", type=int, nargs="+",
        help="experts that the cache holds, per layer or in all (default: K, 1.3 K, 2 K, E/2 and 0.9 E)")  # fmt: skip
    add("--scope", choices=["layer", "shared"], default="layer", help="each layer has its own slots, or all share them")
    add("--cache", choices=["cold", "warm"], default="cold", help="cold: emptied before each request (default)")
    add("--prompt", choices=["replay", "skip"], default="replay",
        help="replay: prompts fill the cache as in the engine; skip: decode steps alone (default: replay)")  # fmt: skip
    routing = parser.add_argument_group("routing")
    add_routing_arguments(routing)
    parser.add_argument("--device", metavar="D", help="a device profile: what the reads of a token take on its drive")
    parser.add_argument("--model", metavar="MODEL", type=Path,
                        help="bundle, checkpoint or config.json of the trace: TPOT on the --device, too")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw hit rate and misses over slots (.svg or .png)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Simulate and print. Raises UsageError for traces or settings that cannot be."""
    rate, prior, tpot = _drive_rate(args.device), _prior(args), _tpot(args)
    if args.plot:
        check_plot(args.plot)
    if prior is not None:
        console.note(
            "cache-prior here is open loop: the recorded logits stand, although another expert would change what "
            "follows; edge eval --routing cache-prior runs the model"
        )
    args.policy, args.slots = list(dict.fromkeys(args.policy or [])), list(dict.fromkeys(args.slots or []))
    if prior is not None and args.policy == [BELADY]:
        raise UsageError(
            "--policy belady must know what will be asked for, which cache-prior routing makes depend on the cache: "
            "name another policy; the share of the optimum is told beside it"
        )
    rows: list[Row] = []
    with console.Progress(quiet=args.json, unit="caches") as progress:
        for path in args.traces:
            trace = Trace.load(path)
            found = _rows(path, trace, args, prior, rate, progress)
            rows += [replace(row, tpot=tpot(trace, row.result)) for row in found] if tpot else found
    if args.plot:
        plot_curves(rows, args.plot, args.scope)
        console.note(f"curves: {args.plot}")
    if args.json:
        console.print_json({"scope": args.scope, "cache": args.cache, "results": [_json(row) for row in rows]})
    else:
        print(console.format_table(_table(rows, args)))
    return 0


def _rows(
    path: Path, trace: Trace, args: argparse.Namespace, prior: CachePrior | None, rate: float | None,
    progress: console.Progress,
) -> list[Row]:  # fmt: skip
    found, sizes = [], args.slots or default_slots(trace.info.top_k, trace.info.num_experts)
    if args.scope == "shared" and not args.slots:
        sizes = [slots * len(trace.info.moe_layers) for slots in sizes]
    for done, slots in enumerate(sizes, 1):
        best = simulate(trace, _setting(args, BELADY, slots, None)) if prior is None else None
        for policy in args.policy or _possible(trace):
            if policy == BELADY and best is None:
                continue  # it must know what will be asked for
            result = best if policy == BELADY and best else simulate(trace, _setting(args, policy, slots, prior))
            drive_ms = None if rate is None else 1000 * result.bytes_per_token / rate
            routing = str(prior or trace.info.routing)
            asked = replace(trace, experts=result.experts)
            optimum = best or simulate(asked, _setting(args, BELADY, slots, None))
            found.append(Row(path.name, routing, policy, slots, result, share_of_optimum(result, optimum), drive_ms))
        progress.update(path.name, done, len(sizes))
    return found


def _possible(trace: Trace) -> list[str]:
    """All policies but those that need what the trace has not."""
    return [policy for policy in SIMULATED if policy != GATE or trace.logits is not None]


def default_slots(top_k: int, experts: int) -> list[int]:
    """Sizes per layer that tell most of the story: as small as can be, twice that, half of all, nearly all."""
    sizes = {top_k, round(_TIGHT * top_k), 2 * top_k, experts // 2, round(_NEAR_FIT * experts)}
    return sorted(size for size in sizes if top_k <= size <= experts)


def _setting(args: argparse.Namespace, policy: str, slots: int, prior: CachePrior | None) -> Setting:
    where = {"shared_slots" if args.scope == "shared" else "slots_per_layer": slots}
    return Setting(policy, **where, cold=args.cache == "cold", prompt=args.prompt, prior=prior)


def _prior(args: argparse.Namespace) -> CachePrior | None:
    """Of the arguments only those that say how tokens are routed: --policy and --scope are of the simulated cache."""
    names = ("routing", "prior_strength", "prior_top_j", "prior_scaling")
    return engine_options(argparse.Namespace(**{name: getattr(args, name) for name in names})).prior


def _tpot(args: argparse.Namespace) -> Callable[[Trace, Result], Prediction] | None:
    """TPOT of the decode steps; None without --model."""
    if args.model is None:
        return None
    if args.device is None:
        raise UsageError("--model tells TPOT on a device: name it with --device")
    from edge.forecast import load_config
    from profiles.device import load_device
    from profiles.predict import check_model, predict
    from profiles.sizes import model_sizes

    sizes, device = model_sizes(load_config(args.model), 1), load_device(args.device)
    if device.overheads is None:
        console.note(f"TPOT on {device.name} is a floor: not measured there, and an engine is slower")

    def tpot(trace: Trace, result: Result) -> Prediction:
        check_model(trace, sizes)
        return predict(sizes, device, result.missed[trace.decode.astype(bool)])

    return tpot


def _drive_rate(name: str | None) -> float | None:
    if name is None:
        return None
    from profiles.device import load_device

    return load_device(name).storage.typical.value


def _table(rows: list[Row], args: argparse.Namespace) -> list[list[str]]:
    head = ["trace", "routing", "policy", "slots", "hit rate", "misses/token", "MB/token", "share of optimum"]
    cells = [
        [
            row.trace, row.routing, row.policy, str(row.slots), f"{row.result.unique_hit_rate:.4f}",
            f"{row.result.misses / row.result.decode_tokens:.2f}", f"{row.result.bytes_per_token / 1e6:.2f}",
            f"{row.share:.3f}",
            *([f"{row.drive_ms:.1f}"] if row.drive_ms is not None else []),
            *([_range_ms(row.tpot)] if row.tpot is not None else []),
            *([f"{row.result.agreement:.4f}"] if row.result.agreement is not None else []),
        ]
        for row in rows
    ]  # fmt: skip
    head += ["drive ms/token"] if args.device else []
    head += ["TPOT, ms (fast to slow drive)"] if args.model else []
    head += ["agreement"] if any(row.result.agreement is not None for row in rows) else []
    same = {i for i in (0, 1) if len({line[i] for line in cells}) == 1}  # a column that says one thing is no column
    return [[cell for i, cell in enumerate(line) if i not in same] for line in [head, *cells]]


def _range_ms(tpot: Prediction) -> str:
    return f"{tpot.tpot_ms.mean():.1f} ({tpot.fast_ms.mean():.1f} to {tpot.slow_ms.mean():.1f})"


def _json(row: Row) -> dict[str, Any]:
    result = row.result
    return {
        "trace": row.trace,
        "routing": row.routing,
        "policy": row.policy,
        "slots": row.slots,
        "unique_hit_rate": result.unique_hit_rate,
        "requests": result.requests,
        "hits": result.hits,
        "misses": result.misses,
        "misses_by_layer": result.misses_by_layer.tolist(),
        "prompt_misses": int(result.prompt_misses.sum()),
        "decode_tokens": result.decode_tokens,
        "bytes_per_token": result.bytes_per_token,
        "share_of_optimum": row.share,
        "drive_ms_per_token": row.drive_ms,
        "agreement": result.agreement,
        "tpot_ms": _tpot_json(row.tpot),
    }


def _tpot_json(tpot: Prediction | None) -> dict[str, float] | None:
    if tpot is None:
        return None
    return {name.removesuffix("_ms"): float(getattr(tpot, name).mean()) for name in vars(tpot)}
