"""A dense feed-forward layer as experts, without training and equal to it but for rounding.

The neurons are cut into G segments, each stored in R copies: expert copy * G + segment. The router gives the G
experts of a copy one logit, so that top-G always takes one whole copy; the normalised weights are 1 / G each, which
the factor G in `down` undoes (a power of two: no rounding). Copies are equal in weights, so which one the router
takes changes what is read and cached, never the text.

A few neurons of SmolLM2 answer the first token with values near 25,000, and G times that is more than fp16 holds. So
the L loudest neurons of a layer stand in every segment with their own `down` (their G shares of 1 / G make the whole);
the (G - 1) * L next loudest give up their places for it and become the shared expert, whose gate is 1/2.

Shapes: H hidden, I intermediate, G segments, R copies; an expert has I/G neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from demo.layout import Half, Layout, dense_tensors, to_half
from demo.source import DenseConfig, DenseSource

SEGMENTS = 4
LOUD = 32  # neurons per layer that stand in every segment
ROUTING_FILE = Path(__file__).with_name("centroids.safetensors")


@dataclass(frozen=True)
class Routing:
    """What calibration adds per layer: `gates` [layers, R, H], and `order` [layers, G * L], the loudest neurons."""

    gates: npt.NDArray[np.float16]
    order: npt.NDArray[np.int16]

    @classmethod
    def load(cls, copies: int) -> Routing:
        """The committed result of the calibration for that many copies."""
        from safetensors.numpy import load_file

        calibrated = load_file(ROUTING_FILE)
        return cls(calibrated[f"copies_{copies}"], calibrated["loudest"])

    @property
    def copies(self) -> int:
        """R."""
        return int(self.gates.shape[1])

    @property
    def loud(self) -> int:
        """L."""
        return int(self.order.shape[1]) // SEGMENTS

    def layout(self, dense: DenseConfig) -> Layout:
        """Sizes of the checkpoint."""
        return Layout(
            dense,
            num_experts=self.copies * SEGMENTS,
            expert_size=dense.intermediate_size // SEGMENTS,
            shared_size=(SEGMENTS - 1) * self.loud,
            top_k=SEGMENTS,
            normalised=True,
        )

    def layer(self, source: DenseSource, number: int) -> Iterator[tuple[str, Half]]:
        """The tensors of one layer in the order of the layout, rounded to fp16."""
        yield from dense_tensors(source, number, np.repeat(to_half(self.gates[number]), SEGMENTS, axis=0))
        gate, up, down = (to_half(source.layer(number, f"mlp.{part}_proj")) for part in ("gate", "up", "down"))
        shared, *segments = split_mlp(gate, up, down, SEGMENTS, self.order[number])
        experts = [(f"experts.{e}", segments[e % SEGMENTS]) for e in range(self.copies * SEGMENTS)]
        for name, weights in [("shared_expert", shared), *experts]:
            for part, weight in zip(("gate", "up", "down"), weights, strict=True):
                yield f"model.layers.{number}.mlp.{name}.{part}_proj.weight", weight


def split_mlp(
    gate: Half, up: Half, down: Half, segments: int, order: npt.NDArray[np.int16]
) -> list[tuple[Half, Half, Half]]:
    """gate, up [I, H] and down [H, I] as (gate, up, down) of the shared expert, then of each segment.

    `order` names the G * L loudest neurons, the loudest first.
    """
    loud, shared = np.split(order, [len(order) // segments])
    others = np.delete(np.arange(len(gate)), order)
    parts = [(gate[shared], up[shared], down[:, shared] * np.float16(2))]  # the gate's 1/2
    for own in np.split(others, segments):
        neurons = np.concatenate([own, loud])
        factor = np.repeat(np.array([segments, 1], np.float16), [len(own), len(loud)])
        parts.append((gate[neurons], up[neurons], down[:, neurons] * factor))
    return parts
