"""SmoothQuant: moves outliers of activations behind a norm into the weights that read it.

    y = Norm(x; g, b), z = y @ w   →   y' = Norm(x; g / s, b / s), z = y' @ (s · w),   s = max|y|^a / max|w|^(1 - a), for each channel

The float graph answers as before; one scale a tensor then wastes fewer of its steps on few channels (Xiao et al., "SmoothQuant", 2022).
Norms that anything else than linear layers reads, a residual sum for instance, are left alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.optimizers.base import Observe
from onnxpress.optimizers.dependencies import NORMS
from onnxpress.optimizers.edits import add_constant, drop_unused_constants, unused_name
from onnxpress.optimizers.linear import Linear, linears
from onnxpress.optimizers.matching import constant
from onnxpress.optimizers.rounding import Float


def check_smooth(name: str, exponent: float) -> None:
    """Raises RecipeError where a pass's option is no exponent."""
    if not 0 <= exponent < 1:
        raise RecipeError(f"Pass {name!r}: smooth is {exponent}; it takes 0 (off) to below 1, e.g. 0.5.")


def smooth_norms(graph: Graph, observe: Observe, exponent: float) -> tuple[str, ...]:
    """Change the scales of norms and the weights behind them; returns notes. Raises RecipeError without calibration inputs."""
    readers: dict[ir.Value, list[Linear]] = {}
    for linear in linears(graph):
        readers.setdefault(linear.x, []).append(linear)
    norms = [value for value, found in readers.items() if _is_only_read_by(value, found)]
    ranges = observe(graph, [str(value.name) for value in norms])
    for value in norms:
        found = ranges[str(value.name)]
        activations = np.maximum(np.abs(found.low), np.abs(found.high))
        weights = np.max([np.abs(linear.weight_array()).max(axis=1) for linear in readers[value]], axis=0)
        usable = (activations > 0) & (weights > 0)
        factors = np.ones_like(activations)
        factors[usable] = activations[usable] ** exponent / weights[usable] ** (1 - exponent)
        _divide_norm(graph, value, factors)
        for linear in readers[value]:
            _multiply_weight(graph, linear, factors)
        value.name = unused_name(graph.model.graph, f"{value.name}_smooth")  # its numbers are others now
    drop_unused_constants(graph)
    return (f"{len(norms)} norms smoothed",)


def _is_only_read_by(value: ir.Value, found: list[Linear]) -> bool:
    node = value.producer()
    if node is None or node.op_type not in NORMS or value.is_graph_output() or len(value.uses()) != len(found):
        return False
    arrays = [constant(parameter) for parameter in node.inputs[1:] if parameter is not None]
    return bool(arrays) and all(array is not None and array.ndim == 1 for array in arrays)


def _divide_norm(graph: Graph, value: ir.Value, factors: Float) -> None:
    node = value.producer()
    assert node is not None
    for index in range(1, len(node.inputs)):
        array = constant(node.inputs[index])
        if array is not None:
            node.replace_input_with(index, _constant(graph, node.inputs[index], array / factors))


def _multiply_weight(graph: Graph, linear: Linear, factors: Float) -> None:
    node = linear.product
    weight: npt.NDArray[np.float32] = linear.weight_array() * factors[:, None]  # (in, out)
    transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
    array = weight.T if node.op_type == "Gemm" and linear.transposed else weight
    node.replace_input_with(1, _constant(graph, linear.weight, np.ascontiguousarray(array)))
    if transpose is not None and not transpose.outputs[0].uses():
        graph.model.graph.remove(transpose, safe=True)


def _constant(graph: Graph, like: ir.Value | None, array: npt.NDArray[Any]) -> ir.Value:
    assert like is not None
    return add_constant(graph, f"{like.name}_smooth", array.astype(np.float32))
