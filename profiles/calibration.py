"""This host as a device profile: what `edge calibrate` measures. profiles/calibration_fit.py works the figures out.

Random models run in the real engine. Two of them differ in nothing but experts per token, the others in the size of
their experts, and every one has more weights in a layer than fit into a core's caches: between two of its steps a real
model leaves no code and no data of the first one there. Each runs with several cache sizes, all resident among them.
The drive is read raw as well, by block size and depth. All of them take turns, so that the machine's mood meets all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from profiles.device import Figure, ReadRate, Storage
from profiles.random_model import SyntheticOptions, random_ids
from profiles.raw_reads import RawReader
from profiles.sizes import Sizes, model_sizes
from runtime.engine import Engine, EngineOptions, GenerateOptions
from runtime.records import TokenRecord

MANY = SyntheticOptions(
    layers=12,
    vocab_size=4096,
    hidden_size=512,
    num_experts=32,
    top_k=8,
    expert_size=64,
    shared_size=1024,
    num_heads=8,
)
FEW = replace(MANY, num_experts=16, top_k=2)
MEDIUM = replace(MANY, layers=4, num_experts=16, expert_size=512, shared_size=512)
LARGE = replace(MEDIUM, layers=2, hidden_size=1024, expert_size=1024, shared_size=1024, num_heads=16)
MODELS = {"few": FEW, "many": MANY, "medium": MEDIUM, "large": LARGE}
BLOCKS_BYTES = (4 << 10, 256 << 10, 1 << 20, 4 << 20)
DEPTHS = (1, 2, 4, 8)
TURNS, _TURN_TOKENS = 5, 6
_PROMPT_TOKENS = 48  # ask for all experts, and leave attention little to do
_COLD_TOKENS = 4

Models = Mapping[str, Path]  # bundles of MODELS
Tick = Callable[[str], None]


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


@dataclass(frozen=True)
class Runs:
    """Decode steps of one model: records with every expert resident, and those of smaller caches."""

    sizes: Sizes
    resident: Sequence[TokenRecord]
    missing: Sequence[Sequence[TokenRecord]] = ()


def measure(models: Models, threads: int | None, seconds: float, tick: Tick) -> tuple[Rates, dict[str, Runs]]:
    """The drive that holds the bundles, `seconds` for every setting and turn, and decode steps of every model.

    The engines are all open at once, one for each model and cache size: 1.2 GB with the memory of the raw reads.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(closing(RawReader.open(sorted(models["large"].glob("experts/*/*")))))
        decodings = {}
        for name, options in MODELS.items():
            tick("engine")
            plain = EngineOptions(threads=threads, prefetch=0)  # a forecast knows nothing of guesses
            settings = [replace(plain, slots_per_layer=slots) for slots in cache_sizes(options)]
            engines = [stack.enter_context(Engine.open(models[name], setting)) for setting in settings]
            decodings[name] = [_Decoding(engine) for engine in engines]
        rates: dict[tuple[int, int], list[float]] = {}
        for _ in range(TURNS):
            _read(reader, seconds, rates, tick)
            tick("engine")
            for decoding in [decoding for several in decodings.values() for decoding in several]:
                decoding.take(_TURN_TOKENS)
    return Rates(rates), {
        name: Runs(resident.sizes, resident.records, [decoding.records for decoding in missing])
        for name, (resident, *missing) in decodings.items()
    }


def _read(reader: RawReader, seconds: float, rates: dict[tuple[int, int], list[float]], tick: Tick) -> None:
    """One more round of every setting."""
    for block in BLOCKS_BYTES:
        for depth in DEPTHS:
            tick("drive")
            rates.setdefault((block, depth), []).append(reader.rate(block, depth, seconds=seconds))


def cache_sizes(options: SyntheticOptions) -> tuple[int, ...]:
    """Slots per layer, all experts first. With top-k 8 the others miss about one, two to three, and four to six."""
    experts, top_k = options.num_experts, options.top_k
    return (experts,) if top_k == FEW.top_k else (experts, experts - experts // 8, (top_k + experts) // 2, top_k)


def steps() -> int:
    """How often a whole calibration ticks, without making the models."""
    return TURNS * (len(BLOCKS_BYTES) * len(DEPTHS) + 1) + len(MODELS)


class _Decoding:
    """An answer that is computed piece by piece."""

    def __init__(self, engine: Engine) -> None:
        self.sizes = model_sizes(engine.config, engine.context)
        tokens = _COLD_TOKENS + TURNS * (_TURN_TOKENS + 1)
        options = GenerateOptions(max_new_tokens=tokens, temperature=1.0, seed=1, ignore_eos=True)
        self._tokens = engine.generate(random_ids(engine.config.vocab_size, _PROMPT_TOKENS, seed=1), options)
        self.records: list[TokenRecord] = []
        for _ in range(_COLD_TOKENS):
            next(self._tokens)

    def take(self, count: int) -> None:
        """One more than `count`: the first comes after other engines' work and is left out."""
        self.records += [next(self._tokens).record for _ in range(count + 1)][1:]
