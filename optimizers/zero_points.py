"""Takes zero points out of what layers of integers read, where OpenVINO is faster without.

    layer(scale * (q - zero point)) + b   →   layer(scale * q) + (b - scale * zero point * the weights' sums)

Exact but for rounding. docs/openvino.md has what it wins.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.bias_correction import add_to_bias
from onnxpress.optimizers.matching import attribute, constant, produced_by
from onnxpress.optimizers.openvino_misread import is_padded


def fold_zero_points(graph: Graph, layers: Collection[ir.Node]) -> None:
    """Take the zero points of what layers of integers read into their biases, where such layers alone read it, and without padding.

    layers: MatMul, Gemm, Conv and ConvTranspose as int8-qdq writes them.
    """
    for node in dict.fromkeys(produced_by(layer.inputs[0], "DequantizeLinear") for layer in layers):
        assert node is not None
        scale, zero_point = constant(node.inputs[1]), constant(node.inputs[2])
        assert scale is not None
        assert zero_point is not None
        if zero_point.any():
            uses = list(node.outputs[0].uses())
            if not all(use.idx == 0 and use.node in layers and _reads_no_padding(use.node) for use in uses):
                continue
            for use in uses:
                add_to_bias(graph, use.node, -scale.item() * zero_point.item() * _weight_sums(use.node))
        node.resize_inputs(2)


def _reads_no_padding(layer: ir.Node) -> bool:
    return layer.op_type in ("MatMul", "Gemm") or (layer.op_type == "Conv" and not is_padded(layer))


def _weight_sums(layer: ir.Node) -> npt.NDArray[np.float64]:
    """What a layer without a bias answers to ones everywhere, (channels,)."""
    dequantize = produced_by(layer.inputs[1], "DequantizeLinear")
    assert dequantize is not None
    integers, scales = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    assert integers is not None
    assert scales is not None
    rest = tuple(axis for axis in range(integers.ndim) if axis != attribute(dequantize, "axis", 1))
    sums: npt.NDArray[np.float64] = integers.sum(axis=rest, dtype=np.int64) * scales.astype(np.float64)
    return sums
