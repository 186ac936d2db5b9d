"""The trained part of the mixture as a small file, and the checkpoint's tensors rebuilt from it and the dense model.

The file holds which neurons go where, the gates, the scales, and the low-rank changes in fp16 on a grid of 2^-16: so
their products, summed in double precision, are exact in any order, and every machine rebuilds the same bytes.

Shapes: L layers, H hidden, I neurons, S shared, E experts, M neurons of an expert, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from demo.distill import TOP_K
from demo.layout import Half, Layout, dense_tensors
from demo.source import DenseConfig, DenseSource
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from demo.distill.mixture import Mixture
    from demo.distill.network import Network

Double = npt.NDArray[np.float64]

MIXTURE_FILE = Path(__file__).with_name("mixture.safetensors")

_GRID = 65536.0
_TRAINED = ("gate", "in_a", "in_b", "out_a", "out_b")
_LIMIT = 8.0  # a change's factor above this would cost the exactness: 2 * (3 + 16) + 5 bits of a sum are 43 of 53
_DTYPES = {"shared": "int16", "experts": "int16", "gate": "float16", "scale": "float32"} | dict.fromkeys(
    ("in_a", "in_b", "out_a", "out_b"), "float16"
)


@dataclass(frozen=True)
class Packed:
    """`shared` [L, S], `experts` [L, E, M], `gate` [L, E, H], `scale` [L], `in_a` [L, r, H], `in_b` [L, 2I, r],
    `out_a` [L, r, I], `out_b` [L, H, r]. Rows of in_b and columns of out_a: shared neurons first, then the routed."""

    shared: npt.NDArray[np.int16]
    experts: npt.NDArray[np.int16]
    gate: Half
    scale: npt.NDArray[np.float32]
    in_a: Half
    in_b: Half
    out_a: Half
    out_b: Half

    @classmethod
    def load(cls, path: Path = MIXTURE_FILE) -> Packed:
        """Raises CheckpointError when a tensor is missing or of another dtype."""
        from safetensors.numpy import load_file

        tensors = load_file(path)
        found = {name: str(tensor.dtype) for name, tensor in tensors.items()}
        if found != _DTYPES:
            raise CheckpointError(f"{path}: tensors are {found}, expected {_DTYPES}")
        return cls(**tensors)

    def save(self, path: Path) -> None:
        """As one safetensors file."""
        from safetensors.numpy import save_file

        save_file({name: np.ascontiguousarray(getattr(self, name)) for name in _DTYPES}, path)

    def order(self, layer: int) -> npt.NDArray[np.int64]:
        """Neurons of a layer as the changes count them: the shared ones, then the routed ones in rising order."""
        return np.concatenate([self.shared[layer], np.unique(self.experts[layer])]).astype(np.int64)

    def layout(self, dense: DenseConfig) -> Layout:
        """Sizes of the checkpoint."""
        _, experts, size = self.experts.shape
        return Layout(dense, experts, size, shared_size=self.shared.shape[1], top_k=TOP_K, normalised=False)

    def layer(self, source: DenseSource, number: int) -> Iterator[tuple[str, Half]]:
        """The tensors of one layer in the order of the layout, rounded to fp16 once."""
        yield from dense_tensors(source, number, self.gate[number])
        order = self.order(number)
        change_in, change_out = (
            b[number].astype(np.float64) @ a[number].astype(np.float64)
            for a, b in ((self.in_a, self.in_b), (self.out_a, self.out_b))
        )
        gate, up = np.split(change_in, 2)
        weights = {
            "gate": source.layer(number, "mlp.gate_proj")[order] + gate,
            "up": source.layer(number, "mlp.up_proj")[order] + up,
            "down": (source.layer(number, "mlp.down_proj")[:, order] + change_out).T,
        }
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        prefix, factor = f"model.layers.{number}.mlp", float(self.scale[number])
        # the shared expert's gate is 1/2
        yield from _expert(f"{prefix}.shared_expert", weights, np.arange(self.shared.shape[1]), 2.0)
        for expert, neurons in enumerate(self.experts[number]):
            yield from _expert(f"{prefix}.experts.{expert}", weights, place[neurons.astype(np.int64)], factor)


def pack(mixtures: list[Mixture]) -> Packed:
    """Trained layers, rounded as they will be rebuilt."""

    def stacked(name: str, dtype: str) -> npt.NDArray[np.generic]:
        return np.stack([getattr(m, name).detach().numpy().astype(dtype) for m in mixtures])

    changes = {name: _on_grid(stacked(name, "float64"), name) for name in ("in_a", "in_b", "out_a", "out_b")}
    return Packed(
        shared=np.stack([m.split.shared.numpy().astype(np.int16) for m in mixtures]),
        experts=np.stack([m.split.experts.numpy().astype(np.int16) for m in mixtures]),
        gate=np.stack([m.gate.detach().numpy().astype(np.float16) for m in mixtures]),
        scale=np.array([np.exp(m.log_scale.item()) for m in mixtures], np.float32),
        **changes,
    )


def unpacked(network: Network, packed: Packed) -> list[Mixture]:
    """The layers as they were packed, to train on or to measure."""
    import torch

    from demo.distill.mixture import Mixture
    from demo.distill.split import Split

    mixtures = []
    for number, layer in enumerate(network.layers):
        tensors = {n: torch.from_numpy(getattr(packed, n)[number].astype(np.float32)) for n in _TRAINED}
        shared, experts = (torch.from_numpy(a[number].astype(np.int64)) for a in (packed.shared, packed.experts))
        scale = torch.tensor(float(np.log(packed.scale[number])))
        mixture = Mixture(layer, Split(shared, experts), tensors["gate"], float(scale), rank=packed.in_a.shape[1])
        mixture.load_state_dict(tensors | {"log_scale": scale})
        mixtures.append(mixture)
    return mixtures


def _on_grid(values: npt.NDArray[np.generic], name: str) -> Half:
    rounded = (np.round(values.astype(np.float64) * _GRID) / _GRID).astype(np.float16)
    if np.abs(rounded).max() > _LIMIT:
        raise CheckpointError(f"{name}: {np.abs(rounded).max()} is beyond {_LIMIT}: train with a smaller rate")
    return rounded


def _expert(
    name: str, weights: dict[str, Double], rows: npt.NDArray[np.int64], factor: float
) -> Iterator[tuple[str, Half]]:
    yield f"{name}.gate_proj.weight", weights["gate"][rows].astype(np.float16)
    yield f"{name}.up_proj.weight", weights["up"][rows].astype(np.float16)
    yield f"{name}.down_proj.weight", np.ascontiguousarray((weights["down"][rows] * factor).astype(np.float16).T)
