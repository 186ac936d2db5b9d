"""How a bundle is opened and how text is generated: the options that the command line takes its defaults from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from runtime.backends import BackendName, ExpertKernelName
from runtime.cache import Scope
from runtime.cache_prior import CachePrior, Scaling
from runtime.errors import UsageError
from runtime.policies import POLICIES
from runtime.sampler import SamplingOptions

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEFAULT_CONTEXT = 4096
PRIOR_NEEDS = "--prior-strength, --prior-top-j and --prior-scaling need --routing cache-prior"
_MOST_THREADS = 1024  # with far more the library that is asked for them crashes


@dataclass(frozen=True)
class EngineOptions:
    """How a bundle is run. Of `slots_per_layer` and `expert_memory_bytes` at most one is given; with neither, the
    expert cache takes what fits beside the rest.
    """

    backend: BackendName = "auto"
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    slots_per_layer: int | None = None
    expert_memory_bytes: int | None = None
    scope: Scope = "layer"
    policy: str = "lru"
    prefetch: int | None = None  # experts of the next layer that are read on a guess; None: see runtime.budget.guesses
    router: str = "base"
    routing: Literal["stock", "cache-prior"] = "stock"
    prior_strength: float = CachePrior.strength
    prior_top_j: int = CachePrior.top_j
    prior_scaling: Scaling = CachePrior.scaling
    context: int | None = None  # tokens of the KV cache; default: the model's, at most DEFAULT_CONTEXT
    direct_io: bool = True
    read_threads: int = 8
    threads: int | None = None  # of the arithmetic; default: torch's choice, within the control group's CPU quota
    cuda_graphs: bool = False  # TensorRT: one launch per block and token; not the default until a GPU has shown a gain
    expert_kernel: ExpertKernelName = "torch"  # on a GPU, for single tokens; likewise
    record: Path | None = None

    def check(self) -> None:
        """Raises UsageError for values that cannot be."""
        known = {
            "dtype": ["auto", *DTYPES],
            "scope": ["layer", "shared"],
            "policy": list(POLICIES),
            "routing": ["stock", "cache-prior"],
            "expert_kernel": ["torch", "fused"],
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UsageError(f"unknown {name} {getattr(self, name)!r} (known: {', '.join(values)})")
        if self.slots_per_layer is not None and self.expert_memory_bytes is not None:
            raise UsageError("--slots-per-layer and --expert-memory say the same thing twice: give one of them")
        for name in ("slots_per_layer", "expert_memory_bytes", "context", "read_threads", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.removesuffix('_bytes').replace('_', '-')} {value}: expected at least 1")
        if self.prefetch is not None and self.prefetch < 0:
            raise UsageError(f"--prefetch {self.prefetch}: expected 0 (no guesses) or more")
        for name in ("threads", "read_threads"):
            value = getattr(self, name)
            if value is not None and value > _MOST_THREADS:
                raise UsageError(f"--{name.replace('_', '-')} {value}: expected at most {_MOST_THREADS}")
        _ = self.prior

    @property
    def prior(self) -> CachePrior | None:
        """How cached experts are preferred; None with stock routing, where the prior options may not be changed.

        Raises UsageError when they are.
        """
        prior = CachePrior(self.prior_strength, self.prior_top_j, self.prior_scaling)
        if self.routing == "cache-prior":
            return prior
        if prior != CachePrior():
            raise UsageError(PRIOR_NEEDS)
        return None


@dataclass(frozen=True)
class GenerateOptions:
    """How text is generated. `temperature` 0 is greedy.

    With `reuse_prefix` a conversation is not read again for each answer; the rows were computed one by one instead of
    together, so in low precision the answer can differ from that of a fresh sequence.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    reuse_prefix: bool = False  # keep the KV rows of what the prompt has in common with the sequence before

    def check(self) -> None:
        """Raises UsageError for values that cannot be."""
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens}: expected at least 1")
        self.sampling()

    def sampling(self) -> SamplingOptions:
        """The part that the sampler needs. Raises UsageError for values that cannot be."""
        return SamplingOptions(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )
