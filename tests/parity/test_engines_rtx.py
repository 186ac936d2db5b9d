"""TensorRT-RTX parses and builds the graphs of every family and of every option of attention, for a GPU that is not
there: strongly typed fp16, with the shape ranges of decoding and of prompts. It proves that they compile, not what they
compute; that is compared in ONNX Runtime (test_onnx_parity.py, test_families*.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from export.engine_build import BuildRequest, build, shape_ranges
from export.engine_worker import checked_graph
from export.exporter import export_bundle
from export.settings import ExportOptions
from runtime.bundle import Bundle
from runtime.engine_store import EngineLimits
from runtime.graph_io import dense_parts, part_io
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.parity.dense_models import MODELS, make_bundle
from tests.rtx import needs_rtx

pytestmark = needs_rtx
OPTIONS = EngineLimits(context=128, prefill=64, workspace_bytes=256 << 20)


def unique_parts(bundle: Bundle) -> Iterator[str]:
    """Layers of equal kind have equal graphs but for the places of their weights: one of each kind is enough."""
    config, seen = bundle.config, set()
    for part in [*dense_parts(config), "expert"]:
        kind, _, number = part.partition("_")
        moe = kind == "mlp" and int(number) in config.moe_layers
        if (kind, moe) not in seen:
            seen.add((kind, moe))
            yield part


def assert_builds(path: Path) -> None:
    from runtime.backends.tensorrt_library import load

    library, bundle = load(("tensorrt-rtx",)), Bundle.open(path)
    try:
        for part in unique_parts(bundle):
            io, ranges = part_io(bundle.config, part), shape_ranges(bundle.config, part, OPTIONS)
            graph, place = checked_graph(bundle, part), str(path / "dense" / part)
            built = build(library, BuildRequest(part, graph, place, io, ranges, OPTIONS.workspace_bytes, "86"))
            assert built.engine.nbytes > 100_000 and built.layers > 5, part
    finally:
        bundle.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_builds(family: str, tmp_path: Path) -> None:
    overrides = {"q_lora_rank": 24} if family == "deepseek_v3" else {}
    export_bundle(
        str(make_checkpoint(tmp_path / "checkpoint", family, **overrides)), tmp_path / "b", ExportOptions(("fp16",))
    )
    assert_builds(tmp_path / "b")


@pytest.mark.parametrize("name", MODELS)
def test_every_option_of_attention_builds(name: str, tmp_path: Path) -> None:
    assert_builds(make_bundle(tmp_path / "b", MODELS[name]).path)
