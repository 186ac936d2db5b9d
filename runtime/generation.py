"""The generate loop: one answer, token by token, and what is known about it afterwards."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass

import torch

from runtime.opening import Assembly
from runtime.options import GenerateOptions
from runtime.records import FinishReason, Meter, Recorder, Summary, TokenRecord
from runtime.sampler import Sampler


@dataclass(frozen=True)
class Token:
    """One output token: `text` is what may be printed now (stop strings are held back), empty without a tokenizer."""

    id: int
    text: str
    record: TokenRecord


Tokens = Generator[Token, None, None]


class Generation:
    """One answer to one prompt: `summary` and `records` grow while `tokens` runs, which it does once."""

    def __init__(
        self, assembly: Assembly, prompt: list[int], options: GenerateOptions, sampler: Sampler, eos: tuple[int, ...]
    ) -> None:
        """`eos`: the ids that end a text."""
        self.prompt, self.options = prompt, options
        self.summary = Summary(prompt_tokens=len(prompt))
        self.records: list[TokenRecord] = []
        self._assembly, self._sampler, self._eos = assembly, sampler, eos
        self._stream = assembly.tokenizer.stream(options.stop) if assembly.tokenizer else None

    def tokens(self, recorder: Recorder, begin: int) -> Tokens:
        """The tokens as they are computed; the first one's time began at `begin` (CLOCK_MONOTONIC, ns).

        Whatever ends it sets the summary's finish reason. Raises ReadError when an expert cannot be read.
        """
        summary = self.summary
        summary.finish_reason = "error"
        try:
            yield from self._loop(recorder, begin)
        except (GeneratorExit, KeyboardInterrupt):
            summary.finish_reason = "interrupted"
            raise
        finally:
            summary.text += self._stream.finish() if self._stream else ""  # what a stop string might have swallowed

    def _loop(self, recorder: Recorder, begin: int) -> Tokens:
        """Forward, choose, record, yield."""
        backend, decoder = self._assembly.backend, self._assembly.decoder
        cache, loader = self._assembly.cache, self._assembly.loader
        meter, inputs, history = Meter(loader.busy_ns()), self._rewound(), list(self.prompt)
        for index in range(self.options.max_new_tokens):
            with backend.step(len(inputs)):
                chosen = self._sampler.choose(decoder.forward(inputs), history)
            history.append(chosen)
            text, reason = self._take(index, chosen)
            total_ns = time.monotonic_ns() - begin
            record = meter.record(index, chosen, total_ns, decoder.take_timing(), cache.take_stats(), loader.busy_ns())
            self.records.append(record)
            try:
                yield Token(chosen, text, record)
            finally:  # also when the caller has had enough
                begin = time.monotonic_ns()
                recorder.token(record)
            if reason:
                self.summary.finish_reason = reason
                return
            inputs = torch.tensor([chosen])

    def _rewound(self) -> torch.Tensor:
        """Go back to what the prompt has in common with the sequence before, if asked to; the rest [S] is the input."""
        decoder = self._assembly.decoder
        kept = self.summary.reused_tokens = decoder.shared_prefix(self.prompt) if self.options.reuse_prefix else 0
        decoder.rewind(kept)
        # Neither time nor reads of whatever ran before are the first token's.
        decoder.take_timing()
        self._assembly.cache.take_stats()
        return torch.tensor(self.prompt[kept:])

    def _take(self, index: int, chosen: int) -> tuple[str, FinishReason | None]:
        """Add a token to the summary: what may be printed now, and why it is the last one, if it is."""
        stream = self._stream
        self.summary.token_ids.append(chosen)
        text = stream.push(chosen) if stream else ""
        reason = self._finished(index, chosen)
        if reason and stream:
            text += "" if stream.stopped else stream.finish()
        self.summary.text += text
        return text, reason

    def _finished(self, index: int, chosen: int) -> FinishReason | None:
        if self._stream and self._stream.stopped:
            return "stop"
        if chosen in self._eos and not self.options.ignore_eos:
            return "eos"
        return "length" if index + 1 == self.options.max_new_tokens else None
