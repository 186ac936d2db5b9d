"""How a workload is run: how many prompts, how many tokens, and what is in the cache when a request begins."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from runtime.errors import UsageError

CacheState = Literal["cold", "warm"]


@dataclass(frozen=True)
class Protocol:
    """Always one request at a time and greedy.

    `cache`: cold empties the expert cache before every request, warm leaves what the request before has left there.
    `warm_up` requests run before anything is counted.
    """

    name: str = "default"
    prompts: int = 8
    new_tokens: int = 64
    ignore_eos: bool = True
    cache: CacheState = "warm"
    repeats: int = 1
    warm_up: int = 1

    def changed(self, **values: Any) -> Protocol:
        """With the values that are not None; the name then says that it is no longer the named protocol.

        Raises UsageError for values that cannot be.
        """
        said = {name: value for name, value in values.items() if value is not None}
        other = {name: value for name, value in said.items() if value != getattr(self, name)}
        name = self.name + (f", changed: {', '.join(f'{k}={v}' for k, v in other.items())}" if other else "")
        result = dataclasses.replace(self, **{**other, "name": name})
        for field, least in (("prompts", 1), ("new_tokens", 2), ("repeats", 1), ("warm_up", 0)):
            if getattr(result, field) < least:
                raise UsageError(f"{field.replace('_', '-')} {getattr(result, field)}: expected at least {least}")
        if result.cache == "warm" and not result.warm_up:
            raise UsageError("a warm cache needs at least one warm-up request: --warm-up 1, or --cache cold")
        return result


PROTOCOLS = {
    "default": Protocol(),
    # ReMoE's: 128 prompts, batch 1, greedy, 64 tokens, end of text ignored, cold cache for each request.
    "remoe": Protocol("remoe", prompts=128, new_tokens=64, ignore_eos=True, cache="cold"),
    # What `llama-cli -n 128` does with a prompt: at most 128 tokens, end of text ends it.
    "llama.cpp": Protocol("llama.cpp", prompts=8, new_tokens=128, ignore_eos=False, cache="warm"),
}
