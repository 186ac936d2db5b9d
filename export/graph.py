"""A small builder of ONNX graphs whose weights lie in a bundle's safetensors files.

Opset 18 and IR version 8 belong together; TensorRT 10.3's parser and every current ONNX Runtime read them.
Names are counted, nothing depends on time or hashes: the same calls give the same bytes.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
IR_VERSION = 8
FP16: int = TensorProto.FLOAT16
FP32: int = TensorProto.FLOAT
Locate = Callable[[str, str], tuple[int, int]]
Dims = Sequence[int | str]


class Graph:
    """One graph under construction. Values are names; `compute` is the ONNX type of its GEMMs.

    `locate(file, tensor)` gives the byte offset and length of a tensor in a bundle file.
    """

    def __init__(self, name: str, compute: int, locate: Locate) -> None:
        self.name = name
        self.compute = compute
        self._locate = locate
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: int, shape: Dims) -> str:
        """Declare an input; a str in `shape` names a dynamic dimension."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, value: str, dtype: int, shape: Dims) -> None:
        """Declare `value` as the output `name`."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output and return that output's name."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Append a node with several outputs and return their names."""
        node = f"{kind}_{len(self._nodes)}"
        names = [node] if outputs == 1 else [f"{node}.{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=node, **attributes))
        return names

    def weight(self, file: str, tensor: str, shape: Sequence[int]) -> str:
        """An fp16 initializer whose bytes are those of `tensor` in the bundle file `file`."""
        if tensor not in self._weights:
            offset, length = self._locate(file, tensor)
            proto = TensorProto(name=tensor, data_type=FP16, dims=list(shape))
            proto.data_location = TensorProto.EXTERNAL
            # A graph lies in the directory of its weights: ONNX refuses locations outside of it.
            for key, value in (("location", posixpath.basename(file)), ("offset", offset), ("length", length)):
                proto.external_data.add(key=key, value=str(value))
            self._weights[tensor] = proto
        return tensor

    def const(self, value: Any, dtype: Any = np.int64) -> str:
        """A constant of a few bytes, stored in the graph itself; equal constants are stored once."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, f"const_{len(self._constants)}")
        return self._constants[key].name

    def cast(self, value: str, dtype: int) -> str:
        """`value` as `dtype` (FP16 or FP32)."""
        return self.op("Cast", value, to=dtype)

    def build(self) -> bytes:
        """The serialized ModelProto."""
        graph = helper.make_graph(
            self._nodes,
            self.name,
            self._inputs,
            self._outputs,
            initializer=[*self._weights.values(), *self._constants.values()],
        )
        model = helper.make_model(graph, producer_name="remoe-edge", ir_version=IR_VERSION)
        del model.opset_import[:]
        model.opset_import.append(helper.make_opsetid("", OPSET))
        return bytes(model.SerializeToString(deterministic=True))
