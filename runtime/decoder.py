"""The way of a token: embed, for each layer a block and its experts, head.

Prefill goes layer by layer over a whole chunk of the prompt, so that every needed expert is read once per layer.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.backends.base import Backend
from runtime.cache import ExpertCache, Request
from runtime.config import ModelConfig
from runtime.graph_io import BLOCK_TOKENS
from runtime.kv_cache import KVCache
from runtime.router import Routing

CHUNK_BYTES = 64 << 20  # experts' outputs of one layer that prefill may hold


@dataclass
class Timing:
    """Where time went, ns. `expert` includes waiting for reads, which the cache counts."""

    dense: int = 0
    routing: int = 0
    expert: int = 0


class Decoder:
    """One sequence through a model: tokens in, logits out."""

    def __init__(
        self, config: ModelConfig, backend: Backend, router: Routing, cache: ExpertCache, kv_cache: KVCache
    ) -> None:
        self._config = config
        self._backend = backend
        self.router = router
        self.cache = cache
        self._kv_cache = kv_cache
        self._moe_layers = frozenset(config.moe_layers)
        self._next_moe = dict(itertools.pairwise(config.moe_layers))
        self._tokens: list[int] = []  # those whose rows are in the KV cache
        self._timing = Timing()

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The next S tokens [S] int64; returns the logits [V] fp32 after the last of them.

        Raises ReadError when an expert cannot be read; `rewind` makes the decoder usable again.
        """
        for chunk in self._chunks(token_ids):
            x = self._forward_chunk(chunk)
        begin = time.monotonic_ns()
        logits = self._backend.run_head(x[-1:])[0]
        self._timing.dense += time.monotonic_ns() - begin
        return logits

    @torch.inference_mode()
    def forward_all(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Like `forward`, but the logits [S, V] after every token: for tests and perplexity."""
        return torch.cat([self._backend.run_head(self._forward_chunk(chunk)) for chunk in self._chunks(token_ids)])

    @torch.inference_mode()
    def states(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Like `forward`, but what the head would see after every token: [S, H] fp32."""
        return torch.cat([self._forward_chunk(chunk) for chunk in self._chunks(token_ids)])

    @torch.inference_mode()
    def head(self, states: torch.Tensor) -> torch.Tensor:
        """`states` [S, H] to logits [S, V] fp32."""
        return self._backend.run_head(states)

    def shared_prefix(self, token_ids: Sequence[int]) -> int:
        """How many of `token_ids` from the start are in the KV cache already, the last one never counted."""
        pairs = zip(self._tokens, token_ids[:-1], strict=False)
        return next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self._tokens), len(token_ids) - 1))

    def rewind(self, length: int = 0) -> None:
        """Keep the first `length` tokens of the sequence and forget the others; the expert cache stays warm."""
        if length == 0:
            self.router.begin()
        del self._tokens[length:]
        self._kv_cache.length = length

    def take_timing(self) -> Timing:
        """Where the time went since the last call."""
        timing, self._timing = self._timing, Timing()
        return timing

    def _chunks(self, token_ids: torch.Tensor) -> Sequence[torch.Tensor]:
        return token_ids.split(prefill_chunk(self._config))

    def _forward_chunk(self, token_ids: torch.Tensor) -> torch.Tensor:
        x = self._backend.embed(token_ids)
        for layer in range(self._config.num_layers):
            x = self._layer(layer, x)
        self._kv_cache.advance(len(token_ids))
        self._tokens += token_ids.tolist()
        return x

    def _layer(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        begin = time.monotonic_ns()
        x, h = self._block(layer, x)
        self._timing.dense += time.monotonic_ns() - begin
        added = self._experts(layer, h) if layer in self._moe_layers else self._mlp(layer, h)
        return torch.add(x, added, alpha=self._config.residual_scale)

    def _block(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(x) <= BLOCK_TOKENS:
            return self._backend.run_block(layer, x, self._kv_cache)
        start, parts = self._kv_cache.length, []
        for piece in x.split(BLOCK_TOKENS):
            parts.append(self._backend.run_block(layer, piece, self._kv_cache))
            self._kv_cache.advance(len(piece))
        self._kv_cache.length = start  # the next layer writes the same rows
        outputs, inputs = zip(*parts, strict=True)
        return torch.cat(outputs), torch.cat(inputs)

    def _mlp(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        begin = time.monotonic_ns()
        out = self._backend.run_mlp(layer, h)
        self._timing.dense += time.monotonic_ns() - begin
        return out

    def _experts(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """Shared and routed experts: h [S, H] to [S, H] fp32.

        Reads start before the shared experts are computed. Outputs are kept per place in the router's order and summed
        in that order, so the result does not depend on what was in the cache.
        """
        begin = time.monotonic_ns()
        routed = self.router.route(layer, h)
        self.cache.saw(layer, routed.logits, routed.experts)
        places = _places(routed.experts)
        self._timing.routing += time.monotonic_ns() - begin
        outputs = torch.empty(*routed.experts.shape, h.shape[-1], dtype=torch.float32, device=h.device)
        with self.cache.fetch(layer, list(places)) as request:
            if len(h) == 1 and self.cache.prefetches:
                self._prefetch(layer, h)
            shared = self._mlp(layer, h) if self._config.shared_intermediate_size else None
            begin = time.monotonic_ns()
            if len(h) == 1:  # a prompt may need the slots of some residents for others
                self._residents(h, request, list(places), outputs)
            for expert, slot in request:
                rows, ranks = places[expert]
                outputs[rows, ranks] = self._backend.run_expert(h[rows], slot)
        mixed = (outputs * routed.weights[..., None]).sum(dim=1)
        if shared is not None:
            mixed += shared
        self._timing.expert += time.monotonic_ns() - begin
        return mixed

    def _prefetch(self, layer: int, h: torch.Tensor) -> None:
        """Queue, behind this layer's reads, what the next one will probably want."""
        begin = time.monotonic_ns()
        following = self._next_moe.get(layer)
        if following is not None:
            self.cache.prefetch(following, self.router.guess(following, h))
        self._timing.routing += time.monotonic_ns() - begin

    def _residents(self, h: torch.Tensor, request: Request, chosen: list[int], outputs: torch.Tensor) -> None:
        """Those of a token's experts that are in the cache, at once: h [1, H] to their places in outputs [1, K, H]."""
        with request.residents() as held:
            if held:
                ranks = [chosen.index(expert) for expert, _ in held]
                outputs[0, ranks] = self._backend.run_experts(h, [slot for _, slot in held])


def prefill_chunk(config: ModelConfig) -> int:
    """Tokens that prefill takes at once: as many as CHUNK_BYTES of experts' outputs allow."""
    return max(BLOCK_TOKENS, CHUNK_BYTES // (config.router.top_k * config.hidden_size * 4))


def _places(chosen: torch.Tensor) -> dict[int, tuple[torch.Tensor | slice, torch.Tensor | int]]:
    """Which rows and ranks of `chosen` [S, K] name each expert.

    Experts come in the order in which a cache should see them: for one token the router's, for a prompt by last use,
    so that an LRU cache ends up with those of the newest tokens.
    """
    if len(chosen) == 1:
        return {expert: (slice(0, 1), rank) for rank, expert in enumerate(chosen[0].tolist())}
    last_use = {expert: row for row, experts in enumerate(chosen.tolist()) for expert in reversed(experts)}
    order = sorted(last_use, key=last_use.__getitem__)
    return {expert: torch.where(chosen == expert) for expert in order}  # type: ignore[misc]
