"""Which experts a run asked for, and which it had to read again: what the heat map of a report shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from profiles.rundir import Request, Run


@dataclass(frozen=True)
class ExpertUse:
    """Counts [layers with experts, experts] over the decoded tokens of a run.

    `read_again`: the expert had been used earlier in the same answer (its prompt included), had left the cache since,
    and came back from the disk.
    """

    tokens: int
    asked: npt.NDArray[np.int64]
    read: npt.NDArray[np.int64]
    read_again: npt.NDArray[np.int64]


def expert_use(run: Run) -> ExpertUse | None:
    """None for a run of a release whose records had no ids."""
    records = [record for request in run.requests for record in request.records]
    if not records or not records[0].experts:
        return None
    largest = max(max(ids, default=0) for record in records for ids in record.experts)
    width = max(run.header.get("shape", {}).get("experts", 0), largest + 1)
    use = ExpertUse(
        sum(len(request.decode) for request in run.requests),
        *(np.zeros((len(records[0].experts), width), dtype=np.int64) for _ in range(3)),
    )
    for request in run.requests:
        _count(request, use)
    return use


def _count(request: Request, use: ExpertUse) -> None:
    seen: list[set[int]] = [set() for _ in use.asked]
    for record in request.records:
        for layer, (ids, missed) in enumerate(zip(record.experts, record.missed, strict=True)):
            if record.index:  # the prompt's own requests are not decode
                use.asked[layer, ids] += 1
                use.read[layer, missed] += 1
                use.read_again[layer, [expert for expert in missed if expert in seen[layer]]] += 1
            seen[layer].update(ids)
