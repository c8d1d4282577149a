"""Puts the mean error that quantization causes in each layer's output into the layer's bias.

    b   →   b + mean(y of the float graph) - mean(y of the quantized graph), for each output channel

Rounded weights shift the mean of a channel, which every later layer sees, and which costs nothing to take back (Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, the empirical form). Layer after layer: each is
measured with those before it already quantized and corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.base import Stream
from onnxpress.optimizers.edits import add_constant, put_behind, set_input
from onnxpress.optimizers.matching import constant, name_of, only_user, optional
from onnxpress.optimizers.qdq_plan import Layer


def correct_biases(
    graph: Graph,
    original: Graph,
    outputs: Mapping[ir.Node, ir.Value],
    layers: Sequence[Layer],
    stream: Callable[[Graph], Stream],
) -> tuple[str, ...]:
    """Change the biases of `graph`, whose layers are quantized and whose biases are float; returns notes.

    original: the graph before; outputs: what each layer's node gives there.
    """
    expected, found = stream(original), stream(graph)
    corrected = 0
    for layer in layers:
        if layer.node.op_type == "MatMul" and layer.bias is None:
            continue  # an Add more would cost time; what is added behind that is no bias is not the layer's output
        wanted = expected.means(outputs[layer.node], layer.output_axis)
        error = (wanted - found.means(layer.output, layer.output_axis)).astype(np.float32)
        add_to_bias(graph, layer.node, error)
        found.add(layer.output, error, layer.output_axis)
        corrected += 1
    return (f"{corrected} of {len(layers)} biases corrected",)


def add_to_bias(graph: Graph, layer: ir.Node, shift: npt.NDArray[Any]) -> None:
    """Add numbers, (channels,), to the bias of a Conv, ConvTranspose, Gemm or MatMul; one that has none is given one."""
    name, output, place = name_of(layer), layer.outputs[0], _bias_place(layer)
    if place is None:
        bias = add_constant(graph, f"{name}_bias", shift.astype(np.float32))
        put_behind(graph, output, ir.node("Add", [output, bias], name=f"{name}_shifted"))
        return
    node, index = place
    old = constant(optional(node, index))
    new = shift if old is None else old + shift
    set_input(node, index, add_constant(graph, f"{name}_bias", new.astype(np.float32)))


def _bias_place(layer: ir.Node) -> tuple[ir.Node, int] | None:
    """The node and input that hold a layer's bias; None for a MatMul without one."""
    if layer.op_type != "MatMul":
        return layer, 2
    add = only_user(layer.outputs[0], "Add")
    if add is None:
        return None
    index = int(add.inputs[0] is layer.outputs[0])
    bias, weight = constant(add.inputs[index]), layer.inputs[1]
    fits = (
        bias is not None and weight is not None and weight.shape is not None and bias.shape in ((), weight.shape[-1:])
    )
    return (add, index) if fits else None
