"""The table of bench.orin measured: ReMoE's protocol over three workloads, both routers, several cache sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import orin_page
from bench.common import conclude, say
from edge import console
from edge.interrupt import Interrupt
from profiles.compare import Reduction, compare
from profiles.protocol import PROTOCOLS
from profiles.run import ProfileOptions, profile
from profiles.rundir import Run, load_run
from profiles.summary import summarize
from profiles.workloads import load_workload
from runtime.bundle import Bundle
from runtime.engine import Engine, EngineOptions
from runtime.errors import EdgeError, UsageError

WORKLOADS = {"sharegpt": "ShareGPT", "gsm8k": "GSM8K", "humaneval": "HumanEval"}
_DOWNLOAD = Path("out/download")
_NOTE = "\nbench: stopping after the token in work\n"


@dataclass(frozen=True)
class MeasureOptions:
    """`router` is the tuned one. Without `slots` the sizes of the simulated table that fit are measured."""

    router: str | None
    slots: tuple[int, ...] = ()
    prompts: int = 128
    tokens: int = 64


@dataclass(frozen=True)
class Pair:
    """One workload and cache size with both routers."""

    workload: str
    slots: int
    base: Run
    tuned: Run


def measure(bundle: Path, options: MeasureOptions, runs: Path, out: Path) -> None:
    """Profile every setting into `runs`, then write the page into `out`. Raises UsageError before anything is run."""
    if options.router is None:
        raise UsageError("--measure compares two routers: name the tuned one with --router")
    if runs.exists():
        raise UsageError(f"{runs} exists: a run never writes over another one; name a new folder with --runs")
    pairs = []
    for slots in options.slots or _sizes(bundle):
        for workload in WORKLOADS:
            routers = {"base": "base", "tuned": options.router}
            found = [_profile(bundle, workload, slots, item, options, runs) for item in routers.items()]
            pairs.append(Pair(workload, slots, *found))
    out.mkdir(parents=True, exist_ok=True)
    page = out / f"{orin_page.MEASURED}.md"
    page.write_text(page_text(pairs, options), encoding="utf-8")
    say(f"{page} written; edge report {pairs[0].base.path} {pairs[0].tuned.path} shows one pair in full")
    rows = [
        {"workload": p.workload, "slots_per_layer": p.slots, "base": summarize(p.base), "tuned": summarize(p.tuned)}
        for p in pairs
    ]
    conclude("orin-measured", {"bundle": str(bundle), "router": options.router, "rows": rows})


def page_text(pairs: Sequence[Pair], options: MeasureOptions) -> str:
    """The page of measured figures."""
    header = pairs[0].base.header
    machine, engine = header["machine"], header["engine"]
    device = str(machine["device"])
    caution = "" if "Jetson" in device else "\n**This machine is no Jetson board: the times say nothing about one.**\n"
    lines = [_line(pair) for pair in pairs]
    return f"""# ReMoE on {device}, measured
{caution}
{engine["model"]}, {engine["backend"]} {engine["dtype"]}, power mode {machine["power_mode"]}, {header["start_time"]},
commit {machine["commit"]}. Protocol {header["protocol"]["name"]}: greedy, {options.tokens} tokens, cold cache for each
request. Mean TPOT in ms; reductions with a 95 % interval, bootstrap over prompts. {orin_page.SIMULATED}.md says how the
published figures were made.

| workload | slots per layer | hit rate | TPOT, base | TPOT, {options.router} | base / tuned | TPOT less by |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}
{chr(10).join(line[:-1] + "| |" for line in orin_page.paper_rows())}
"""


def _line(pair: Pair) -> str:
    base, tuned = summarize(pair.base), summarize(pair.tuned)
    found = compare(pair.base, pair.tuned)["tpot_ms"]
    means = [summary["tpot_ms"]["mean"] for summary in (base, tuned)]
    return (
        f"| {WORKLOADS[pair.workload]} | {pair.slots} | {base['hit_rate']:.3f} to {tuned['hit_rate']:.3f} "
        f"| {means[0]:.1f} | {means[1]:.1f} | {means[0] / means[1]:.2f} x | {_reduction(found)} |"
    )


def _reduction(found: Reduction) -> str:
    if found.reduction is None:
        return found.why
    interval = found.why if found.low is None or found.high is None else f"{found.low:.1%} to {found.high:.1%}"
    return f"{found.reduction:.1%} ({interval})"


def _sizes(bundle: Path) -> list[int]:
    """K, 1.3 K, 2 K, and what the engine takes by itself: all that fits."""
    opened = Bundle.open(bundle)
    top_k, experts = opened.config.router.top_k, opened.config.router.num_experts
    opened.close()
    with Engine.open(bundle, EngineOptions()) as engine:
        most = engine.slots.per_layer or experts
    return sorted({size for size in (top_k, round(1.3 * top_k), 2 * top_k, most) if size <= most})


def _profile(
    bundle: Path, workload: str, slots: int, router: tuple[str, str], options: MeasureOptions, runs: Path
) -> Run:
    """`router`: its part in the comparison, and its name or file."""
    protocol = PROTOCOLS["remoe"].changed(prompts=options.prompts, new_tokens=options.tokens)
    folder = runs / f"{workload}-{slots}-{router[0]}"
    say(f"{folder.name}: {options.prompts} prompts")
    wanted = ProfileOptions(load_workload(workload, _DOWNLOAD), protocol)
    with (
        Engine.open(bundle, EngineOptions(slots_per_layer=slots, router=router[1])) as engine,
        Interrupt(note=_NOTE) as interrupt,
        console.Progress(unit="requests") as progress,
    ):
        outcome = profile(
            engine, wanted, folder,
            progress=lambda done, total: progress.update(folder.name, done, total),
            note=console.note, stop=lambda: interrupt.requested,
        )  # fmt: skip
    if not outcome.complete:
        raise EdgeError(f"interrupted; the runs until then are in {runs}")
    return load_run(folder)
