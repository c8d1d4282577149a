"""A graph of half precision where no kernel computes in it: float32, and each result rounded to float16 or bfloat16.

    y (bfloat16) = MatMul(x, w)   →   y = Cast(Cast(MatMul(x, w), bfloat16), float32)

ONNX Runtime's CPU provider has no kernels for bfloat16, and computes most of float16 in float32 from one end to the other, so that numbers
past 65504 go by unseen there.

Weights are the same numbers in float32. What a kernel keeps to itself (the scores of an attention, the sums of a product) is rounded on
a card in its own way, and here not at all. For trials alone: it is slower and larger than what it stands for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.half import with_dtype

_BFLOAT16, _FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
HALVES = (_BFLOAT16, ir.DataType.FLOAT16)


def holds_half(graph: Graph) -> bool:
    """Whether anything in a graph is float16 or bfloat16."""
    return any(value.dtype in HALVES for value in _values(graph))


def computes_in_half(graph: Graph) -> bool:
    """Whether more of a graph's operators compute in half precision than in float32; where types are left out, by their weights."""
    found = Counter(_computed_in(node) for node in graph.model.graph if node.op_type != "Cast")
    return sum(found[dtype] for dtype in HALVES) > found[_FLOAT]


def _computed_in(node: ir.Node) -> ir.DataType | None:
    """The first type that is known of the floats that a node answers or reads."""
    known = (value.dtype for value in (*node.outputs, *node.inputs) if value is not None)
    return next((dtype for dtype in known if dtype in (_FLOAT, *HALVES)), None)


def holds_bfloat16(graph: Graph) -> bool:
    """Whether anything in a graph is bfloat16."""
    return any(value.dtype == _BFLOAT16 for value in _values(graph))


def _values(graph: Graph) -> Iterator[ir.Value]:
    return (value for node in graph.model.graph for value in (*node.inputs, *node.outputs) if value is not None)


def in_float32(graph: Graph) -> Graph:
    """The copy that stands in for a graph of half precision; its inputs and outputs of half precision are float32."""
    model = graph.model.clone()
    body = model.graph
    for value in body.initializers.values():
        if value.dtype in HALVES and value.const_value is not None:
            value.const_value = ir.tensor(_widened(value.const_value), name=value.name)
            value.type = ir.TensorType(_FLOAT)
    changed = set()
    for value in body.inputs:
        if value.dtype in HALVES:
            value.type = ir.TensorType(_FLOAT)
            changed.add(str(value.name))
    outputs = {id(value) for value in body.outputs}
    for node in list(body):
        _widen_attributes(node)
        for value in node.outputs:
            if value.dtype not in HALVES:
                continue
            if id(value) in outputs:
                changed.add(str(value.name))
            _round(body, node, value)
    return Graph(model=model, signature=with_dtype(graph.signature, changed, "float32"))


def _round(body: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Put the rounded number in the place of a node's result; its name goes with it."""
    name, half = str(value.name), value.dtype
    assert half is not None
    rounded = value
    value.name = f"{name}_computed"
    last = node
    if node.op_type != "Cast":  # a Cast to half precision rounds already
        value.type = ir.TensorType(_FLOAT)
        last = ir.node("Cast", [value], {"to": half.value}, name=f"{name}_rounded")
        rounded = last.outputs[0]
        rounded.name, rounded.shape, rounded.type = f"{name}_rounded", value.shape, ir.TensorType(half)
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
        if tensor.dtype in HALVES:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_widened(tensor)))
    kind = node.attributes.get("dtype")
    if kind is not None and kind.value in [half.value for half in HALVES]:
        node.attributes["dtype"] = ir.AttrInt64("dtype", _FLOAT.value)


def _widened(tensor: ir.TensorProtocol) -> np.ndarray:
    kind = ml_dtypes.bfloat16 if tensor.dtype == _BFLOAT16 else np.float16
    return np.asarray(tensor.numpy(), kind).astype(np.float32)
