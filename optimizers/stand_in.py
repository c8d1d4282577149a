"""A graph of bfloat16 where no kernel computes in it (ONNX Runtime's CPU provider): float32, and each result rounded to bfloat16.

    y (bfloat16) = MatMul(x, w)   →   y = Cast(Cast(MatMul(x, w), bfloat16), float32)

Weights are the same numbers in float32. What a kernel keeps to itself (the scores of an attention, the sums of a product) is rounded on
a card in its own way, and here not at all. For trials alone: it is slower and larger than what it stands for.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.half import with_dtype

_HALF, _FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def holds_bfloat16(graph: Graph) -> bool:
    """Whether anything in a graph is bfloat16."""
    return any(
        value is not None and value.dtype == _HALF
        for node in graph.model.graph
        for value in (*node.inputs, *node.outputs)
    )


def in_float32(graph: Graph) -> Graph:
    """The copy that stands in for a graph of bfloat16; its inputs and outputs of bfloat16 are float32."""
    model = graph.model.clone()
    body = model.graph
    for value in body.initializers.values():
        if value.dtype == _HALF and value.const_value is not None:
            value.const_value = ir.tensor(_widened(value.const_value), name=value.name)
            value.type = ir.TensorType(_FLOAT)
    changed = set()
    for value in body.inputs:
        if value.dtype == _HALF:
            value.type = ir.TensorType(_FLOAT)
            changed.add(str(value.name))
    outputs = {id(value) for value in body.outputs}
    for node in list(body):
        _widen_attributes(node)
        for value in node.outputs:
            if value.dtype != _HALF:
                continue
            if id(value) in outputs:
                changed.add(str(value.name))
            _round(body, node, value)
    return Graph(model=model, signature=with_dtype(graph.signature, changed, "float32"))


def _round(body: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Put the rounded number in the place of a node's result; its name goes with it."""
    name = str(value.name)
    rounded = value
    value.name = f"{name}_computed"
    last = node
    if node.op_type != "Cast":  # such a one rounds by itself
        value.type = ir.TensorType(_FLOAT)
        last = ir.node("Cast", [value], {"to": _HALF.value}, name=f"{name}_rounded")
        rounded = last.outputs[0]
        rounded.name, rounded.shape, rounded.type = f"{name}_rounded", value.shape, ir.TensorType(_HALF)
        body.insert_after(node, last)
    wide = ir.node("Cast", [rounded], {"to": _FLOAT.value}, name=f"{name}_wide")
    wide.outputs[0].name, wide.outputs[0].shape, wide.outputs[0].type = name, value.shape, ir.TensorType(_FLOAT)
    body.insert_after(last, wide)
    for use in list(value.uses()):
        if use.node not in (last, wide):
            use.node.replace_input_with(use.idx, wide.outputs[0])
    for index, output in enumerate(body.outputs):
        if output is value:
            body.outputs[index] = wide.outputs[0]


def _widen_attributes(node: ir.Node) -> None:
    constant = node.attributes.get("value")
    if constant is not None and constant.type == ir.AttributeType.TENSOR:
        tensor = constant.as_tensor()
        if tensor.dtype == _HALF:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_widened(tensor)))
    kind = node.attributes.get("dtype")
    if kind is not None and kind.value == _HALF.value:
        node.attributes["dtype"] = ir.AttrInt64("dtype", _FLOAT.value)


def _widened(tensor: ir.TensorProtocol) -> np.ndarray:
    return np.asarray(tensor.numpy(), ml_dtypes.bfloat16).astype(np.float32)
