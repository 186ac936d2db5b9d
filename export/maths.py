"""The formulas that the graphs share. Values named by str, see export/graph.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from export.graph import FP16, FP32, Graph


def stored(g: Graph, file: str, tensor: str, shape: Sequence[int], dtype: int) -> str:
    """A weight of the bundle as `dtype`."""
    value = g.weight(file, tensor, shape)
    return value if dtype == FP16 else g.cast(value, dtype)


def linear(g: Graph, x: str, file: str, tensor: str, shape: tuple[int, int], bias: str | None = None) -> str:
    """x @ weight.T (+ bias) in the compute dtype; `shape` is the weight's [out, in]."""
    weight = stored(g, file, tensor, shape, g.compute)
    if bias is None:
        return g.op("Gemm", x, weight, transB=1)
    return g.op("Gemm", x, weight, stored(g, file, bias, shape[:1], g.compute), transB=1)


def rms_norm(g: Graph, x: str, file: str, tensor: str, size: int, eps: float) -> str:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, all fp32."""
    # Pow, ReduceMean, Add, Sqrt, Div, Mul in this order is the pattern that ONNX Runtime fuses into one kernel.
    square = g.op("Pow", x, g.const(2.0, np.float32))
    mean = g.op("ReduceMean", square, g.const([-1]), keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, g.const(eps, np.float32)))
    return g.op("Mul", g.op("Div", x, root), stored(g, file, tensor, (size,), FP32))


def rope(g: Graph, x: str, cos: str, sin: str, dim: int) -> str:
    """Rotate-half position embedding of x [S, heads, dim] with cos and sin [S, 1, dim], all fp32."""
    first, second = g.ops("Split", 2, x, g.const([dim // 2, dim // 2]), axis=-1)
    rotated = g.op("Concat", g.op("Neg", second), first, axis=-1)
    return g.op("Add", g.op("Mul", x, cos), g.op("Mul", rotated, sin))


def gated(g: Graph, gate: str, up: str, down: str, kind: str) -> str:
    """(activation(gate) * up) @ down.T, fp32; only the product has the compute dtype.

    The inner values of real models can leave the range of fp16 (65,504), and the tanh form cubes its input: so they
    stay fp32, and for an fp16 product each row is divided by its largest value, and multiplied by it after.
    """
    activation = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}[kind]
    inner = g.op("Mul", activation(g, g.cast(gate, FP32)), g.cast(up, FP32))
    if g.compute == FP32:
        return g.op("Gemm", inner, down, transB=1)
    largest = g.op("ReduceMax", g.op("Abs", inner), g.const([-1]), keepdims=1)
    scale = g.op("Max", largest, g.const(1.0, np.float32))
    out = g.op("Gemm", g.cast(g.op("Div", inner, scale), g.compute), down, transB=1)
    return g.op("Mul", g.cast(out, FP32), scale)


def add_residual(g: Graph, x: str, branch: str, scale: float) -> str:
    """x + scale * branch in fp32."""
    return g.op("Add", x, scaled(g, g.cast(branch, FP32), scale))


def scaled(g: Graph, x: str, factor: float) -> str:
    """factor * x in fp32; no node for a factor of 1."""
    return x if factor == 1.0 else g.op("Mul", x, g.const(factor, np.float32))


def _silu(g: Graph, x: str) -> str:
    return g.op("Mul", x, g.op("Sigmoid", x))


def _gelu(g: Graph, x: str) -> str:
    erf = g.op("Erf", g.op("Mul", x, g.const(math.sqrt(0.5), np.float32)))
    return _half_of_one_plus(g, x, erf)


def _gelu_tanh(g: Graph, x: str) -> str:
    cube = g.op("Mul", g.op("Pow", x, g.const(3.0, np.float32)), g.const(0.044715, np.float32))
    inner = g.op("Mul", g.op("Add", x, cube), g.const(math.sqrt(2 / math.pi), np.float32))
    return _half_of_one_plus(g, x, g.op("Tanh", inner))


def _half_of_one_plus(g: Graph, x: str, y: str) -> str:
    half = g.op("Mul", x, g.const(0.5, np.float32))
    return g.op("Mul", half, g.op("Add", y, g.const(1.0, np.float32)))
