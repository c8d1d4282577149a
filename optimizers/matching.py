"""Small questions that passes ask of a graph. Changes nothing; edits.py does."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from onnxpress.graph import Graph


def name_of(node: ir.Node) -> str:
    """A node's name, or its output's."""
    return node.name or str(node.outputs[0].name)


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Value of a node's attribute, or the default where it is absent."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def optional(node: ir.Node, place: int) -> ir.Value | None:
    """An input that a node may have or not."""
    return node.inputs[place] if place < len(node.inputs) else None


def produced_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes a value, if it is a standard operator of one of these types."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def only_user(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The one node that reads a value, if nothing else does and it is a standard operator of one of these types."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = next(iter(uses)).node
    producer = value.producer()
    if producer is not None and node.graph is not producer.graph:
        return None
    return node if node.domain == "" and node.op_type in op_types else None


def constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """A value's array where it is fixed: an initializer that no input overrides, or the output of a Constant."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element (and at most one axis) holds."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 and array.ndim <= 1 else None


def operands(node: ir.Node) -> tuple[ir.Value, float] | None:
    """The variable and the number of an Add or Mul with one constant operand, in either order."""
    first, second = node.inputs[0], node.inputs[1]
    for variable, number in ((first, scalar(second)), (second, scalar(first))):
        if variable is not None and number is not None:
            return variable, number
    return None


def close(number: float, wanted: float) -> bool:
    """Equal to one part in a thousand: constants pass through fp16 and through hand-written digits."""
    return abs(number - wanted) <= 1e-3 * abs(wanted)


def rank(value: ir.Value | None) -> int | None:
    """Number of axes, where known."""
    return None if value is None or value.shape is None else len(value.shape)


def dimension(value: ir.Value | None, axis: int) -> int | str | None:
    """Size (int) or symbolic name (str) of one axis, where known."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else size.value


def is_last_axis(axis: int | None, value: ir.Value | None) -> bool:
    """Whether an axis number means the last axis of a value."""
    count = rank(value)
    return axis == -1 or (axis is not None and count is not None and axis == count - 1)


def reduced_axes(node: ir.Node) -> list[int] | None:
    """Over which axes a reduction goes, as the graph says them: an attribute before opset 18 (of ReduceSum 13), an input since. None: not known, or all."""
    axes = attribute(node, "axes", None)
    if axes is None:
        array = constant(optional(node, 1))
        axes = None if array is None else array.reshape(-1).tolist()
    return None if axes is None else [int(axis) for axis in axes]


def reduces_last_axis(node: ir.Node) -> bool:
    """Whether a ReduceMean takes the mean over the last axis alone and keeps it as an axis of size 1."""
    axes = reduced_axes(node)
    keeps = bool(attribute(node, "keepdims", 1))
    return keeps and axes is not None and len(axes) == 1 and is_last_axis(axes[0], node.inputs[0])


def carries_cache(attention: ir.Node) -> bool:
    """Whether an Attention reads, or gives, keys and values of the tokens before."""
    given = attention.outputs[1:]
    return any(value is not None for value in attention.inputs[4:]) or any(
        value.uses() or value.is_graph_output() for value in given
    )


def body_nodes(graph: Graph, *op_types: str) -> list[ir.Node]:
    """The standard operators of these types in the main graph, in order. Subgraphs are left alone."""
    return [node for node in graph.model.graph if node.domain == "" and node.op_type in op_types]
