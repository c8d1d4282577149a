"""Puts the mean error that quantization causes in each layer's output into the layer's bias.

    b   →   b + mean(y of the float graph) - mean(y of the quantized graph), for each output channel

Rounded weights shift the mean of a channel, which every later layer sees, and which costs nothing to take back (Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, the empirical form). Layer after layer: each is
measured with those before it already quantized and corrected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.base import Stream
from onnxpress.optimizers.linear import add_constant
from onnxpress.optimizers.matching import constant
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
        place = _bias_place(layer)
        if place is None:
            continue
        wanted = expected.means(outputs[layer.node], layer.output_axis)
        error = (wanted - found.means(layer.output, layer.output_axis)).astype(np.float32)
        node, index = place
        bias = node.inputs[index] if index < len(node.inputs) else None
        array = np.zeros_like(error) if bias is None else constant(bias)
        assert array is not None
        node.resize_inputs(max(len(node.inputs), index + 1))
        node.replace_input_with(index, add_constant(graph, f"{layer.name}_corrected_bias", array + error))
        found.add(layer.output, error, layer.output_axis)
        corrected += 1
    return (f"{corrected} of {len(layers)} biases corrected",)


def _bias_place(layer: Layer) -> tuple[ir.Node, int] | None:
    """The node and input that hold a layer's bias; None for a MatMul without one."""
    if layer.node.op_type != "MatMul":
        return layer.node, 2
    if layer.bias is None:
        return None
    node = layer.output.producer()
    assert node is not None
    return node, next(index for index, value in enumerate(node.inputs) if value is layer.bias)
