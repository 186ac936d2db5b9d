"""What the graphs are made of: valid ONNX, operators that TensorRT 10.3 parses, weights in the safetensors files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import load_external_data_for_tensor
from safetensors.torch import load_file

from export.blocks import build_graphs
from runtime.errors import UsageError
from runtime.layout import graph_file
from tests.parity.dense_models import MODELS, HandMade, make_bundle

OPERATORS = Path(__file__).parents[2] / "docs" / "onnx-operators.md"


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    return make_bundle(tmp_path_factory.mktemp("bundle") / request.param, MODELS[request.param])


def graphs(made: HandMade) -> list[Path]:
    found = sorted(made.path.glob("dense/*.onnx"))
    parts = 2 + 2 + sum(made.config.mlp_size(layer) > 0 for layer in range(2))
    assert len(found) == 2 * parts
    return found


def test_checker_and_shape_inference(made: HandMade) -> None:
    """The full check reads the external data and infers every type and shape."""
    for path in graphs(made):
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def test_only_operators_of_the_table(made: HandMade) -> None:
    """Operator, version and place are those of docs/onnx-operators.md."""
    table = {
        name: (int(since), set(parts.split(", ")))
        for name, since, parts in re.findall(r"^\| (\w+) \| (\d+) \| ([\w, ]+) \|", OPERATORS.read_text(), re.M)
    }
    assert len(table) == 27
    for path in graphs(made):
        model = onnx.load(path, load_external_data=False)
        assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (8, [("", 18)])
        part = re.split(r"[_.]", path.name)[0].replace("layer", "block")
        for node in model.graph.node:
            since, parts = table[node.op_type]
            assert onnx.defs.get_schema(node.op_type, 18).since_version == since
            assert part in parts, f"{node.op_type} is not listed for {part}"


def test_attention_never_joins_keys_or_values(made: HandMade) -> None:
    """Past rows go into products (after a transpose) and nowhere else, so no node can join them with new rows."""
    for path in graphs(made):
        if not path.name.startswith("layer"):
            continue
        graph = onnx.load(path, load_external_data=False).graph
        readers = {name: {n.op_type for n in graph.node if name in n.input} for name in ("past_k", "past_v")}
        assert all(kinds <= {"Transpose", "MatMul", "Shape"} for kinds in readers.values()), readers
        transposed = {n.output[0] for n in graph.node if {"past_k", "past_v"} & set(n.input) and n.op_type != "Shape"}
        after = {n.op_type for n in graph.node if n.op_type != "Softmax" and transposed & set(n.input)}
        assert after <= {"MatMul", "Cast", "Add"}, after


def test_weights_lie_in_the_safetensors_files(made: HandMade) -> None:
    """Every tensor of the dense files is reached through (location, offset, length) by some graph, with its values."""
    reached: set[tuple[str, str]] = set()
    for path in graphs(made):
        assert path.stat().st_size < 20_000
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            location = {entry.key: entry.value for entry in tensor.external_data}["location"]
            load_external_data_for_tensor(tensor, str(path.parent))
            stored = load_file(path.parent / location)[tensor.name]
            assert stored.dtype == torch.float16
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), stored.numpy())
            reached.add((f"dense/{location}", tensor.name))
    expected = {(file, name) for file, tensors in made.files.items() for name in tensors}
    if not made.config.tied_embeddings:
        expected.remove(("dense/embed.safetensors", "embed"))
    assert reached == expected


def test_equal_calls_give_equal_bytes() -> None:
    """No name or order depends on anything but the config."""
    config = MODELS["gqa-bias-gate"]
    first, second = (dict(build_graphs(config, "fp16", lambda file, tensor: (4096, 2))) for _ in range(2))
    assert first == second
    parts = ["layer_00", "mlp_00", "layer_01", "mlp_01", "head", "expert"]
    assert list(first) == [graph_file(part, "fp16") for part in parts]


def test_unknown_dtype() -> None:
    with pytest.raises(UsageError, match="'int8' \\(known: fp16, fp32\\)"):
        next(build_graphs(MODELS["mha"], "int8", lambda file, tensor: (0, 0)))
