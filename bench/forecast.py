"""Forecast against measurement on this host: TPOT that a calibrated profile predicts, and TPOT that the engine takes.

    python -m bench.forecast out/demo.bundle           and a random model, which it makes and removes again

Routing is recorded once, with every expert resident. From that trace the misses of each cache are simulated, and TPOT
is predicted with the device profile that `edge calibrate` makes. Then the engine answers the same prompts with that
cache, each with a cold start. Profile and answers are measured anew in every round, one after the other, so that a
change of the machine's mood meets both; an error is taken within its round, and the median over rounds counts.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import conclude, run_main, say
from bench.synthetic import write_synthetic
from edge.calibrate import build_models, host_of, measured_figures
from export.exporter import export_bundle
from export.settings import ExportOptions
from profiles.calibration import Models, measure
from profiles.calibration_fit import calibrated
from profiles.device import STREAMING, Device
from profiles.predict import predict, trace_misses
from profiles.random_model import SyntheticOptions, random_ids
from profiles.sizes import Sizes, model_sizes
from profiles.workloads import load_workload
from remoe.record import info_of, record_generation, watching
from remoe.trace import Origin, Trace
from runtime.bundle import Bundle
from runtime.engine import Engine, EngineOptions, GenerateOptions
from runtime.errors import UsageError

AIM = 0.15
_PROMPTS, _CONTEXT, _RANDOM_PROMPT_TOKENS = 3, 512, 32
_RAW_SECONDS = 0.05
_RANDOM = "random"


@dataclass(frozen=True)
class ForecastOptions:
    """What is compared. `routers` are files of tuned routers of the bundles, beside those that the bundles hold."""

    rounds: int = 3
    tokens: int = 16
    layers: int = 2  # of the random model
    threads: int | None = None
    routers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One bundle, router and cache size, with the misses [N, L] that the simulator foresees."""

    name: str
    bundle: Path
    router: str
    slots: int
    sizes: Sizes
    prompts: list[list[int]]
    misses: np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Outcome:
    """One round of a case: median milliseconds per token, and hit rates."""

    predicted_ms: float
    fast_ms: float
    slow_ms: float
    measured_ms: float
    misses_predicted: int
    misses_measured: int

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_ms / self.measured_ms - 1


def cases_of(name: str, path: Path, options: ForecastOptions) -> Iterator[Case]:
    """Two cache sizes per router: barely more than a token needs, and half of all experts."""
    bundle = Bundle.open(path)
    sizes, routers = model_sizes(bundle.config, _CONTEXT), bundle.routers()
    bundle.close()
    experts, top_k = sizes.experts, sizes.top_k
    for router in [*routers, *options.routers] if name != _RANDOM else routers:
        prompts, trace = _record(path, router, options)
        misses = trace_misses(trace, sizes)
        for slots in (round(1.3 * top_k), experts // 2):
            yield Case(f"{name}, {Path(router).stem}", path, router, slots, sizes, prompts, misses(slots))


def run_case(case: Case, device: Device, options: ForecastOptions) -> Outcome:
    """Predict and measure."""
    prediction = predict(case.sizes, device, case.misses)
    records = []
    with _engine(case.bundle, case.router, case.slots, options) as engine:
        for prompt in case.prompts:
            engine.empty_cache()
            records += [token.record for token in engine.generate(prompt, _generate(engine, options))][1:]
    return Outcome(
        predicted_ms=float(np.median(prediction.tpot_ms)),
        fast_ms=float(np.median(prediction.fast_ms)),
        slow_ms=float(np.median(prediction.slow_ms)),
        measured_ms=statistics.median(record.total_ms for record in records),
        misses_predicted=int(case.misses.sum()),
        misses_measured=sum(sum(record.misses) for record in records),
    )


def calibrate_round(models: Models, threads: int | None) -> Device:
    """The profile of this host as it is now."""
    rates, runs = measure(models, threads, _RAW_SECONDS, lambda _: None)
    return calibrated(host_of("here"), rates, runs, measured_figures())


def run(paths: Sequence[Path], scratch: Path, options: ForecastOptions) -> None:
    """Measure every case and print."""
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="forecast-", dir=scratch) as folder:
        models = build_models(Path(folder), lambda _: None)
        bundles = {path.name.removesuffix(".bundle"): path for path in paths}
        bundles[_RANDOM] = _random_bundle(Path(folder), options)
        cases = [case for name, path in bundles.items() for case in cases_of(name, path, options)]
        results: list[list[Outcome]] = [[] for _ in cases]
        devices = []
        for number in range(options.rounds):
            devices.append(calibrate_round(models, options.threads))
            for case, found in zip(cases, results, strict=True):
                found.append(run_case(case, devices[-1], options))
            say(f"round {number + 1} of {options.rounds} done")
    rows = [_row(case, found) for case, found in zip(cases, results, strict=True)]
    _print(rows)
    conclude("forecast", {"aim": AIM, "settings": rows, "profiles": [_figures(d) for d in devices]})


def _row(case: Case, found: list[Outcome]) -> dict[str, Any]:
    middle = {name: statistics.median(getattr(o, name) for o in found) for name in ("predicted_ms", "measured_ms")}
    requests = case.misses.size * case.sizes.top_k
    return {
        "name": case.name,
        "slots_per_layer": case.slots,
        "hit_rate": 1 - found[0].misses_measured / requests,
        **middle,
        "fast_ms": statistics.median(o.fast_ms for o in found),
        "slow_ms": statistics.median(o.slow_ms for o in found),
        "error": statistics.median(o.error for o in found),
        "errors": [o.error for o in found],
        "misses_predicted": found[0].misses_predicted,
        "misses_measured": found[0].misses_measured,
        "rounds": [asdict(o) for o in found],
    }


def _print(rows: list[dict[str, Any]]) -> None:
    say(
        f"{'TPOT, ms: medians over tokens, then rounds':48} hits   misses foreseen, seen   predicted   measured   error"
    )
    for row in rows:
        name = f"{row['name']}, {row['slots_per_layer']} slots per layer"
        misses = f"{row['misses_predicted']:>9}, {row['misses_measured']}"
        times = f"{row['predicted_ms']:9.1f}  {row['measured_ms']:9.1f}  {100 * row['error']:+6.1f} %"
        say(f"  {name:46} {row['hit_rate']:6.2f}   {misses:20} {times}")
    close = sum(abs(row["error"]) <= AIM for row in rows)
    say(f"within {AIM:.0%} of the measurement: {close} of {len(rows)}")


def _record(path: Path, router: str, options: ForecastOptions) -> tuple[list[list[int]], Trace]:
    """Prompts, and the routing of their answers: what the cache holds does not change it."""
    with _engine(path, router, None, options) as engine, watching(engine) as watcher:
        prompts = _prompts(engine, options)
        blocks = [
            record_generation(engine, watcher, n, ids, _generate(engine, options)) for n, ids in enumerate(prompts)
        ]
        info = info_of(engine, "generated", Origin("bench.forecast", "0" * 64))
        return prompts, Trace.from_blocks(info, [block for block in blocks if block is not None])


def _prompts(engine: Engine, options: ForecastOptions) -> list[list[int]]:
    """Our own texts where the bundle has a tokenizer, random ids otherwise."""
    if engine.tokenizer is None:
        return [random_ids(engine.config.vocab_size, _RANDOM_PROMPT_TOKENS, seed) for seed in range(_PROMPTS)]
    texts = [prompt.text for prompt in load_workload("own", Path()).prompts]
    fitting = [ids for ids in map(engine.encode, texts) if len(ids) + options.tokens < _CONTEXT]
    if len(fitting) < _PROMPTS:
        raise UsageError(f"{engine.bundle.path}: its context is too short for the prompts of this benchmark")
    return fitting[:_PROMPTS]


def _generate(engine: Engine, options: ForecastOptions) -> GenerateOptions:
    """Greedy, as forecasts are made; a random model, which may then say one word for ever, draws with a fixed seed."""
    temperature = 0.0 if engine.tokenizer is not None else 1.0
    return GenerateOptions(max_new_tokens=options.tokens + 1, temperature=temperature, ignore_eos=True)


@contextmanager
def _engine(path: Path, router: str, slots: int | None, options: ForecastOptions) -> Iterator[Engine]:
    settings = EngineOptions(
        slots_per_layer=slots, prefetch=0, router=router, context=_CONTEXT, threads=options.threads
    )
    with Engine.open(path, settings) as engine:
        yield engine


def _random_bundle(folder: Path, options: ForecastOptions) -> Path:
    """In the shape of Qwen1.5-MoE-A2.7B, with fewer layers."""
    checkpoint, bundle = folder / "random-checkpoint", folder / "random.bundle"
    write_synthetic(checkpoint, SyntheticOptions(layers=options.layers))
    export_bundle(checkpoint, bundle, ExportOptions(graphs=()))
    shutil.rmtree(checkpoint)
    return bundle


def _figures(device: Device) -> dict[str, float]:
    found = {"memory_read_bytes_per_s": device.memory_read_bytes_per_s.value}
    found["drive_bytes_per_s"] = device.storage.typical.value
    for stream in device.streaming:
        found |= {f"{name}_{stream.blob_bytes}": getattr(stream, name).value for name in STREAMING}
    return found | {name: figure.value for name, figure in vars(device.overheads).items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    defaults = ForecastOptions()
    parser = argparse.ArgumentParser(prog="python -m bench.forecast", description="forecast against measurement")
    parser.add_argument("bundles", type=Path, nargs="*", default=[Path("out/demo.bundle")], help="default: the demo")
    parser.add_argument("--router", dest="routers", nargs="*", default=[], help="router files beside those in a bundle")
    parser.add_argument("--rounds", type=int, default=defaults.rounds)
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="per prompt")
    parser.add_argument("--layers", type=int, default=defaults.layers, help="of the random model, 1.2 GB each")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="where scratch models go")
    options = vars(parser.parse_args(argv))
    paths, scratch = options.pop("bundles"), options.pop("out")
    settings = ForecastOptions(**{**options, "routers": tuple(options["routers"])})
    return run_main(lambda: run(paths, scratch, settings))


if __name__ == "__main__":
    sys.exit(main())
