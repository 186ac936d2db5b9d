"""An unfinished tuning run on disk: gates and optimizer after a step, and what the run must still be like to go on.

One safetensors file; it appears whole or not at all, so whatever happens the last complete one is there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from runtime.errors import UsageError
from runtime.whole_file import whole_file

_MOMENTS = ("exp_avg", "exp_avg_sq")
_DONE = "done."


@dataclass(frozen=True)
class Identity:
    """What decides a run. A state with another one is not resumed."""

    options_sha256: str
    data_sha256: str
    gates_sha256: str
    processes: int


def save_state(
    path: Path,
    step: int,
    gates: list[torch.nn.Parameter],
    optimizer: Any,
    identity: Identity,
    done: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the state after `step`. `done` are tensors that are finished and have no optimizer any more, by name.

    Raises EdgeError when the disk fails.
    """
    tensors: dict[str, Tensor] = {f"{_DONE}{name}": tensor for name, tensor in (done or {}).items()}
    for number, gate in enumerate(gates):
        tensors[f"{number}.weight"] = gate.detach()
        for moment in _MOMENTS:
            tensors[f"{number}.{moment}"] = optimizer.state[gate][moment]
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    metadata = {"state": json.dumps({"step": step, **asdict(identity)})}
    with whole_file(path) as file:
        file.write(save(tensors, metadata))


def load_state(path: Path, gates: list[torch.nn.Parameter], optimizer: Any, identity: Identity, began: int = 0) -> int:
    """Put gates and optimizer into the state and return its step. `began`: the steps before this optimizer's first.

    Raises UsageError when it is of another run, naming what differs.
    """
    with _opened(path) as file:
        stored = json.loads(file.metadata()["state"])
        step = int(stored.pop("step"))
        _same(path, stored, identity)
        for number, gate in enumerate(gates):
            with torch.no_grad():
                gate.copy_(file.get_tensor(f"{number}.weight"))
            moments = {m: file.get_tensor(f"{number}.{m}").to(gate.device) for m in _MOMENTS}
            optimizer.state[gate] = {"step": torch.tensor(float(step - began)), **moments}
    return step


def step_of_state(path: Path) -> int:
    """The last step of an unfinished run. Raises UsageError when the file is none of ours."""
    with _opened(path) as file:
        return int(json.loads(file.metadata()["state"])["step"])


def done_of_state(path: Path) -> dict[str, Tensor]:
    """The finished tensors of an unfinished run, by name. Raises UsageError when the file is none of ours."""
    with _opened(path) as file:
        names = [name for name in file.keys() if name.startswith(_DONE)]  # noqa: SIM118, no dict
        return {name.removeprefix(_DONE): file.get_tensor(name) for name in names}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file; whatever it lacks or has in another form is a UsageError."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise UsageError(f"{path}: not the state of a tuning run ({error}): remove it to start over") from None


def _same(path: Path, stored: dict[str, Any], identity: Identity) -> None:
    words = {
        "options_sha256": "other options",
        "data_sha256": "other data",
        "gates_sha256": "another model",
        "processes": "another number of processes",
    }
    for name, value in asdict(identity).items():
        if stored.get(name) != value:
            raise UsageError(
                f"{path}: the interrupted run had {words[name]}: resume it with the same command, or remove the file "
                "to start over"
            )
