"""Every graph that the exporter can write keeps to what the parser of TensorRT 10.3 reads: docs/onnx-operators.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from export.blocks import build_graphs
from export.families import families, parse_config
from runtime.config import ModelConfig
from tests.parity.dense_models import MODELS
from tests.published_configs import DEEPSEEK_V2_LITE, GLM_4_5_AIR, GRANITE_3_1B_A400M, MOONLIGHT
from tests.unit.test_export_families import MIXTRAL, OLMOE, QWEN3_30B, QWEN15_MOE

PAGE = (Path(__file__).parents[2] / "docs" / "onnx-operators.md").read_text()
READ = set(re.search(r"<!-- parser -->(.*?)<!-- end -->", PAGE, re.S)[1].split())  # type: ignore[index]
PUBLISHED = {
    config["model_type"]: config
    for config in (
        *(QWEN15_MOE, QWEN3_30B, OLMOE, MIXTRAL),
        *(DEEPSEEK_V2_LITE, GLM_4_5_AIR, GRANITE_3_1B_A400M, MOONLIGHT),
    )
}
NEWER = {"Attention", "RotaryEmbedding", "RMSNormalization", "TensorScatter", "Gelu"}


def graphs(config: ModelConfig) -> Iterator[tuple[str, onnx.GraphProto]]:
    for dtype in ("fp16", "fp32"):
        for name, data in build_graphs(config, dtype, lambda file, tensor: (0, 0)):
            yield name, onnx.load_from_string(data).graph


def problems(graph: onnx.GraphProto) -> list[str]:
    """Operators outside the list, and conditions of the table that do not hold."""
    constants = {tensor.name for tensor in graph.initializer}
    found = [f"{node.op_type} is not read" for node in graph.node if node.op_type not in READ]
    for node in graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.domain:
            found.append(f"{node.op_type} is of domain {node.domain}")
        # Inputs that must be initializers, by their place: axes, sizes, limits, repeats.
        places = {"Clip": (1, 2), "Slice": (3,), "Split": (1,), "Tile": (1,), "Unsqueeze": (1,)}
        places |= {"ReduceMax": (1,), "ReduceMean": (1,), "Reshape": (1,)}
        loose = [node.input[i] for i in places.get(node.op_type, ()) if node.input[i] not in constants]
        found += [f"{node.op_type}: {name} is computed" for name in loose]
        if node.op_type == "Cast" and attributes["to"] not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            found.append("Cast to another type than fp16 and fp32")
        if node.op_type == "Shape" and attributes:
            found.append("Shape with start or end")
        if node.op_type == "Gemm" and attributes != {"transB": 1}:
            found.append("Gemm with other attributes than transB = 1")
        if node.op_type == "Softmax" and attributes != {"axis": -1}:
            found.append("Softmax over another axis than the last")
    return found


def test_the_list_is_whole() -> None:
    """It has the table's operators and none that came after 10.3."""
    table = set(re.findall(r"^\| (\w+) \| \d+ \|", PAGE, re.M))
    assert len(table) == 27 and table <= READ and not NEWER & READ
    assert set(PUBLISHED) == set(families())


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_models(family: str) -> None:
    for name, graph in graphs(parse_config(PUBLISHED[family])):
        assert problems(graph) == [], name


@pytest.mark.parametrize("name", MODELS)
def test_every_option(name: str) -> None:
    for part, graph in graphs(MODELS[name]):
        assert problems(graph) == [], part


@pytest.mark.parametrize(
    ("kind", "attributes", "inputs", "message"),
    [
        ("RMSNormalization", {}, ["x", "c"], "RMSNormalization is not read"),
        ("Clip", {}, ["x", "x", "c"], "Clip: x is computed"),
        ("Slice", {}, ["x", "c", "c", "x"], "Slice: x is computed"),
        ("Cast", {"to": TensorProto.BFLOAT16}, ["x"], "Cast to another type"),
        ("Shape", {"start": 1}, ["x"], "Shape with start or end"),
        ("Gemm", {"transB": 1, "alpha": 0.5}, ["x", "x"], "Gemm with other attributes"),
    ],
)
def test_the_check_bites(kind: str, attributes: dict[str, Any], inputs: list[str], message: str) -> None:
    constant = helper.make_tensor("c", TensorProto.INT64, [1], [0])
    node = helper.make_node(kind, inputs, ["y"], **attributes)
    graph = helper.make_graph([node], "bad", [], [], initializer=[constant])
    assert message in "; ".join(problems(graph))
