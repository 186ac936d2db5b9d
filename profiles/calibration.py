"""This host as a device profile: what `edge calibrate` measures, and how the figures are worked out.

Random models run in the real engine. Two are so small that their bytes cost nothing: what is left is the price of each
step of the work, and the two differ in experts per token, which gives the price of an expert. The largest is larger
than a processor's cache: all resident it gives the memory's rate, with few slots, like two with smaller blobs, what
reading costs beside computing. The drive is read raw as well, by block size and depth. Medians over tokens throughout.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from profiles.costs import Costs, device_costs, layer_times
from profiles.device import Device, Figure, Overheads, ReadRate, Storage, Streaming
from profiles.random_model import SyntheticOptions, decode_random
from profiles.raw_reads import RawReader
from profiles.sizes import Sizes, model_sizes
from runtime.engine import Engine, EngineOptions
from runtime.errors import EdgeError
from runtime.records import TokenRecord

FEW = SyntheticOptions(
    layers=8, vocab_size=256, hidden_size=64, num_experts=16, top_k=2, expert_size=32, shared_size=32, num_heads=4
)
MANY = replace(FEW, top_k=8)
LARGE = SyntheticOptions(
    layers=4,
    vocab_size=256,
    hidden_size=1024,
    num_experts=16,
    top_k=4,
    expert_size=1024,
    shared_size=1024,
    num_heads=16,
)
MEDIUM = replace(LARGE, hidden_size=512, expert_size=512, shared_size=512, num_heads=8)
SMALL = replace(LARGE, hidden_size=256, expert_size=128, shared_size=128, num_experts=32, top_k=8, num_heads=4)
BLOCKS_BYTES = (4 << 10, 256 << 10, 1 << 20, 4 << 20)
DEPTHS = (1, 2, 4, 8)
ROUNDS = 3
_TOKENS = {
    "few": 64, "many": 64, "few, missing": 64, "large": 40, "large, missing": 40, "large, half missing": 40,
    "medium, missing": 40, "medium, half missing": 40, "small, missing": 40, "small, half missing": 40,
}  # fmt: skip
STEPS = len(BLOCKS_BYTES) * len(DEPTHS) * ROUNDS + len(_TOKENS)

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Models:
    """Bundles of FEW, MANY, SMALL, MEDIUM and LARGE."""

    few: Path
    many: Path
    small: Path
    medium: Path
    large: Path


@dataclass(frozen=True)
class Rates:
    """Raw read rates in bytes/s, every round of every setting (block bytes, depth)."""

    by_setting: dict[tuple[int, int], list[float]]

    def curve(self, figure: Callable[[float, str], Figure]) -> tuple[ReadRate, ...]:
        """Medians."""
        return tuple(
            ReadRate(block, depth, figure(statistics.median(rates), "raw reads in random order"))
            for (block, depth), rates in self.by_setting.items()
        )

    def storage(self, figure: Callable[[float, str], Figure]) -> Storage:
        """Slowest, median and fastest round of the best setting."""
        best = max(self.by_setting.values(), key=statistics.median)
        return Storage(
            low=figure(min(best), "the slowest round of the best block size and depth"),
            typical=figure(statistics.median(best), "the median round of the best block size and depth"),
            high=figure(max(best), "the fastest round of the best block size and depth"),
        )


def measure_reads(bundle: Path, seconds: float, rounds: int, tick: Tick) -> Rates:
    """Of the disk that holds the bundle, from its expert blobs."""
    reader = RawReader.open(sorted(bundle.glob("experts/*/*")))
    found: dict[tuple[int, int], list[float]] = {}
    try:
        for _ in range(rounds):
            for block in BLOCKS_BYTES:
                for depth in DEPTHS:
                    tick("drive")
                    found.setdefault((block, depth), []).append(reader.rate(block, depth, seconds=seconds))
    finally:
        reader.close()
    return Rates(found)


@dataclass(frozen=True)
class Decoded:
    """Decode steps of one model with one cache."""

    sizes: Sizes
    records: list[TokenRecord]

    def per_layer(self, part: str) -> float:
        """Median seconds of a part of the tokens that missed nothing, per layer with experts."""
        times = [getattr(r, part) for r in self.records if not sum(r.misses)]
        if not times:
            raise EdgeError("every token of a calibration run missed an expert: this is a defect, please report it")
        return statistics.median(times) / 1000 / self.sizes.layers


def decode(bundle: Path, slots: int, tokens: int, threads: int | None) -> Decoded:
    """Tokens of a random model with so many slots per layer."""
    with Engine.open(bundle, EngineOptions(slots_per_layer=slots, threads=threads)) as engine:
        sizes = model_sizes(engine.config, engine.context)
        return Decoded(sizes, decode_random(engine, tokens, seed=1))


def measure_engine(models: Models, threads: int | None, tick: Tick) -> dict[str, Decoded]:
    """Every run that the figures are worked out from, by name."""
    settings = {
        "few": (models.few, FEW.num_experts),
        "many": (models.many, MANY.num_experts),
        "few, missing": (models.few, FEW.top_k),
        "large": (models.large, LARGE.num_experts),
        "large, missing": (models.large, LARGE.top_k),
        "large, half missing": (models.large, LARGE.num_experts // 2),
        "small, missing": (models.small, SMALL.top_k),
        "small, half missing": (models.small, SMALL.num_experts // 2),
        "medium, missing": (models.medium, MEDIUM.top_k),
        "medium, half missing": (models.medium, MEDIUM.num_experts // 2),
    }
    found = {}
    for name, (bundle, slots) in settings.items():
        tick("engine")
        found[name] = decode(bundle, slots, _TOKENS[name], threads)
    return found


@dataclass(frozen=True)
class Host:
    """What a profile says of a machine before anything is measured; `system_bytes` of `ram_bytes` are taken."""

    name: str
    title: str
    ram_bytes: int
    system_bytes: int


def calibrated(host: Host, rates: Rates, runs: dict[str, Decoded], figure: Callable[[float, str], Figure]) -> Device:
    """The profile whose memory rate, read curve and overheads explain the runs."""
    steps = step_costs(runs["few"], runs["many"])
    device = Device(
        name=host.name,
        title=host.title,
        ram_bytes=figure(host.ram_bytes, "the memory that the kernel tells"),
        system_bytes=figure(host.system_bytes, "what was not available then"),
        memory_read_bytes_per_s=figure(memory_rate(runs["large"], steps), "weights of a decoding engine, all resident"),
        storage=rates.storage(figure),
        reads=rates.curve(figure),
        overheads=Overheads(
            token_s=figure(steps.token_s, "other_ms of a model without weight"),
            block_s=figure(steps.block_s, "dense_ms of a model without weight"),
            routing_s=figure(steps.routing_s, "routing_ms, and putting outputs together"),
            expert_s=figure(steps.expert_s, f"expert_ms of {MANY.top_k} experts per token less that of {FEW.top_k}"),
            miss_s=figure(0.0, "not fitted yet"),
        ),
    )
    miss_s = _miss_s(runs["few, missing"], runs["few"])
    assert device.overheads
    found = figure(miss_s, "what tokens that miss tiny blobs take longer, less their waiting")
    device = replace(device, overheads=replace(device.overheads, miss_s=found))
    sizes = ([runs[f"{name}, missing"], runs[f"{name}, half missing"]] for name in ("small", "medium", "large"))
    return replace(device, streaming=tuple(_streaming(device, missing, figure) for missing in sizes))


def _streaming(device: Device, runs: Sequence[Decoded], figure: Callable[[float, str], Figure]) -> Streaming:
    """Of runs with blobs of one size."""
    size = runs[0].sizes.blob_bytes
    share = figure(_read_share(device, runs), "the engine's reads against raw ones")
    known = replace(device, streaming=(Streaming(size, share, figure(0.0, "not fitted yet")),))
    loss = figure(_overlap_loss(known, runs), "what tokens that miss take beyond the sum of their parts")
    return Streaming(size, share, loss)


@dataclass(frozen=True)
class StepCosts:
    """Seconds of the steps of a token whose weights weigh nothing."""

    token_s: float
    block_s: float
    routing_s: float
    mixing_s: float  # a part of routing_s: putting the experts' outputs together
    expert_s: float


def step_costs(few: Decoded, many: Decoded) -> StepCosts:
    """From two models that differ only in experts per token."""
    more = many.sizes.top_k - few.sizes.top_k
    expert = max(0.0, (many.per_layer("expert_ms") - few.per_layer("expert_ms")) / more)
    mixing = max(0.0, few.per_layer("expert_ms") - few.sizes.top_k * expert)
    return StepCosts(
        token_s=statistics.median(r.other_ms for r in few.records) / 1000,
        block_s=max(0.0, few.per_layer("dense_ms") - expert),  # the shared experts are one more product
        routing_s=few.per_layer("routing_ms") + mixing,
        mixing_s=mixing,
        expert_s=expert,
    )


def memory_rate(large: Decoded, steps: StepCosts) -> float:
    """Bytes per second of dense weights and experts, from the time that is left after what each step costs."""
    sizes = large.sizes
    size = sizes.dense_layer_bytes + sizes.shared_bytes + sizes.top_k * sizes.expert_bytes
    fixed = steps.block_s + steps.mixing_s + (1 + sizes.top_k) * steps.expert_s
    seconds = large.per_layer("dense_ms") + large.per_layer("expert_ms") - fixed
    if seconds <= 0:
        raise EdgeError("the large calibration model took no longer than the small ones: run it again, with less else")
    return size / seconds


def _miss_s(missing: Decoded, resident: Decoded) -> float:
    """What the steps of a token take longer per tiny blob that it misses: all but the waiting, which is the drive's."""
    usual = _median([r.total_ms for r in resident.records if not sum(r.misses)])
    found = []
    for record in missing.records:
        if misses := sum(record.misses):
            found.append((record.total_ms - record.wait_ms - usual) / misses / 1000)
    return max(0.0, _median(found))


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _read_share(device: Device, runs: Sequence[Decoded]) -> float:
    """The drive's own time over the time in which the engine had reads on their way."""
    shares = []
    for run in runs:
        costs = device_costs(run.sizes, device)
        for record in run.records:
            misses = np.array([m for m in record.misses if m], dtype=np.float64)
            if len(misses) and record.read_busy_ms:
                shares.append(float(costs.read_s(misses).sum()) / (record.read_busy_ms / 1000))
    return min(2.0, statistics.median(shares)) if shares else 1.0


def _overlap_loss(device: Device, runs: Sequence[Decoded]) -> float:
    """Of the shorter of reading and computing, the share that the tokens did not hide."""
    losses = []
    for run in runs:
        costs = device_costs(run.sizes, device)
        for record in run.records:
            hidden = _hidden_s(costs, run.sizes.top_k, record)
            if hidden:
                seconds = _predicted_s(costs, run.sizes.top_k, record)
                losses.append((record.total_ms / 1000 - seconds) / hidden)
    return min(1.0, max(0.0, statistics.median(losses))) if losses else 0.0


def _predicted_s(costs: Costs, top_k: int, record: TokenRecord) -> float:
    misses = np.array(record.misses, dtype=np.float64)
    return costs.token_s + float(layer_times(costs, top_k, misses).total_s.sum())


def _hidden_s(costs: Costs, top_k: int, record: TokenRecord) -> float:
    """Seconds in which reading and computing could go on at once."""
    return _predicted_s(replace(costs, overlap_loss=1.0), top_k, record) - _predicted_s(costs, top_k, record)
