"""Chats that the dense model writes itself, questions included: training text of its own distribution and licence.

A row of a batch is one long chat. The model samples the question of a user, then its answer, then the next question:
where a turn ends, the marker of the other role is put in by force. Some questions get their first words from OPENINGS,
so that stories, code and sums all occur.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch.nn import functional as F

from demo.distill.network import Network

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
OPENINGS = (
    "Write a Python function that",
    "Write a short story about",
    "Write an essay about",
    "Write a program in JavaScript that",
    "Explain how",
    "Explain the difference between",
    "What is",
    "What are the best ways to",
    "How do I",
    "How many",
    "Why",
    "Can you",
    "Give me a list of",
    "Summarize the following text:",
    "Translate",
    "I have a",
    "If a train",
    "A farmer has",
    "Tell me about",
    "Create a plan for",
    "Fix this code:",
    "Write an email to",
    "Describe",
    "Compare",
    "Here is an article:",
    "Let's play a game.",
    "Act as",
    "Who was",
    "When did",
    "Solve",
)
TEMPERATURE, TOP_K = 0.9, 80


def write_chats(network: Network, tokenizer: Any, rows: int, length: int, seed: int) -> torch.Tensor:
    """Token ids [rows, length] int64 of chats sampled from the dense model with that seed."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.tensor(tokenizer.encode(SYSTEM).ids)
    chats = torch.empty(rows, length, dtype=torch.long)
    chats[:, : len(start)] = start
    turns = [_Turns(tokenizer) for _ in range(rows)]
    for turn in turns:
        turn.open("user", generator)
    memory = _Memory(network, rows, length)
    with torch.inference_mode():
        logits = memory.step(chats[:, : len(start)])
        for at in range(len(start), length):
            sampled = _sample(logits, generator)
            chats[:, at] = torch.tensor([turn.next(int(t), generator) for turn, t in zip(turns, sampled, strict=True)])
            logits = memory.step(chats[:, at : at + 1])
    return chats


class _Memory:
    """Keys and values of a batch, and the steps that extend them."""

    def __init__(self, network: Network, rows: int, length: int) -> None:
        c = network.config
        shape = (c.num_layers, rows, c.num_kv_heads, length, c.hidden_size // c.num_heads)
        self._network, self._filled = network, 0
        self._keys, self._values = torch.empty(shape), torch.empty(shape)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, S], the next of every row, to logits [B, V] of the last."""
        network, end = self._network, self._filled + ids.shape[1]
        rope = network.rope(torch.arange(self._filled, end))
        x = network.embedding[ids]
        for number, layer in enumerate(network.layers):
            q, k, v = network.project(layer, x, rope)
            self._keys[number, :, :, self._filled : end], self._values[number, :, :, self._filled : end] = k, v
            keys, values = self._keys[number, :, :, :end], self._values[number, :, :, :end]
            if ids.shape[1] == 1:  # the query heads of a key head as if they were tokens: nothing is repeated
                q = q.unflatten(1, (keys.shape[1], -1)).squeeze(3)
                mixed = F.scaled_dot_product_attention(q, keys, values).flatten(1, 2)[:, None]
            else:
                mixed = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True).transpose(1, 2)
            x = x + F.linear(mixed.flatten(2), layer.out)
            x = x + network.mlp(layer, network.normalise(x, layer.mlp_norm))
        self._filled = end
        return network.logits(x[:, -1])


class _Turns:
    """Whose turn it is in one chat, and the tokens that are put in by force."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end = tokenizer.token_to_id("<|im_end|>")
        self._stops = {self._end, tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_start|>")}
        self._forced: deque[int] = deque()
        self._role = ""

    def open(self, role: str, generator: torch.Generator) -> None:
        """Queue a role's marker and, for every other question, its first words."""
        self._role = role
        text = f"<|im_start|>{role}\n"
        if role == "user" and torch.rand((), generator=generator) < 0.5:
            text += OPENINGS[int(torch.randint(len(OPENINGS), (), generator=generator))]
        self._forced.extend(self._tokenizer.encode(text).ids)

    def next(self, sampled: int, generator: torch.Generator) -> int:
        """The token of this step: a forced one while there are some, else the sampled one."""
        if self._forced:
            return self._forced.popleft()
        if sampled not in self._stops:
            return sampled
        self._forced.extend(self._tokenizer.encode("\n").ids)
        self.open("assistant" if self._role == "user" else "user", generator)
        return int(self._end)


def _sample(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    best = logits.topk(TOP_K, dim=-1)
    weights = (best.values.float() / TEMPERATURE).softmax(-1)
    return best.indices.gather(-1, weights.multinomial(1, generator=generator)).squeeze(-1)
