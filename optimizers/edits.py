"""The small changes that passes make to a graph: another node, value or constant in one's place, or behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.graph import Graph


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    name: str,
    dtype: ir.DataType | None,
    shape: ir.Shape | Sequence[int | str | None] | None = None,
) -> ir.Value:
    """Put a standard operator with one output in front of a node. `name` is for both; a taken one gets a number."""
    assert isinstance(before.graph, ir.Graph)
    name = unused_name(before.graph, name)
    node = ir.node(op_type, inputs, attributes or {}, name=name)
    output = node.outputs[0]
    output.name = name
    output.type = None if dtype is None else ir.TensorType(dtype)
    output.shape = None if shape is None else ir.Shape(shape)
    before.graph.insert_before(before, node)
    return output


def add_constant(graph: Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Register an initializer; where the name is taken, a number is added to it."""
    name = unused_name(graph.model.graph, name)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.model.graph.initializers[name] = value
    return value


def replace_value(graph: Graph, old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand wherever `old` is used, as a graph output too (whose name it then takes)."""
    body = graph.model.graph
    for index, output in enumerate(body.outputs):
        if output is old:
            name = old.name
            old.name = f"{name}_replaced"
            new.name = name
            body.outputs[index] = new
    ir.convenience.replace_all_uses_with(old, new)


def replace_node(graph: Graph, old: ir.Node, new: ir.Node) -> None:
    """Put a node with one output in another's place. The output keeps name, type and shape."""
    before, after = old.outputs[0], new.outputs[0]
    name, after.shape, after.type = before.name, before.shape, before.type
    graph.model.graph.insert_before(old, new)
    replace_value(graph, before, after)
    graph.model.graph.remove(old, safe=True)
    after.name = name


def replace_constant(graph: Graph, node: ir.Node, place: int, array: npt.NDArray[np.generic]) -> ir.Value:
    """Let one input of a node be another constant, under the old name where nothing else reads the old one."""
    value = node.inputs[place]
    assert value is not None
    name = str(value.name)
    if value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output():
        del graph.model.graph.initializers[name]
        value.name = None
    new = add_constant(graph, name, np.ascontiguousarray(array))
    node.replace_input_with(place, new)
    return new


def replace_everywhere(graph: Graph, value: ir.Value, array: npt.NDArray[np.generic]) -> None:
    """Let a constant be another one wherever it is read, under the same name."""
    if value.is_initializer():
        value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
        value.shape = ir.Shape(array.shape)
    else:
        new = add_constant(graph, str(value.name), np.ascontiguousarray(array))
        ir.convenience.replace_all_uses_with(value, new)


def insert_behind(graph: Graph, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Put nodes right behind the one that gives a value; before all others where it is an input or a weight."""
    body, producer = graph.model.graph, value.producer()
    if producer is not None:
        body.insert_after(producer, nodes)
    else:
        body.insert_before(body[0], nodes)


def put_behind(graph: Graph, value: ir.Value, node: ir.Node) -> None:
    """Let a node that reads a value give what the value's other readers read."""
    uses = [(use.node, use.idx) for use in value.uses() if use.node is not node]
    own = [place for place, read in enumerate(node.inputs) if read is value]
    insert_behind(graph, value, [node])
    output = node.outputs[0]
    output.name = unused_name(graph.model.graph, str(node.name))
    output.type, output.shape = value.type, value.shape
    if value.is_graph_output():
        replace_value(graph, value, output)
        for place in own:
            node.replace_input_with(place, value)
    for user, place in uses:
        user.replace_input_with(place, output)


def unused_name(body: ir.Graph, wanted: str) -> str:
    """A name that no value of a graph has: the wanted one, or that with a number."""
    taken = {value.name for node in body.all_nodes() for value in node.outputs}
    taken.update(value.name for value in body.inputs)
    taken.update(body.initializers)
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def drop_unused_constants(graph: Graph) -> None:
    """Remove initializers that nothing uses any more."""
    body = graph.model.graph
    for name, value in list(body.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del body.initializers[name]


def set_input(node: ir.Node, place: int, value: ir.Value | None) -> None:
    """Let a node read a value at a place that it may not have yet."""
    node.resize_inputs(max(len(node.inputs), place + 1))
    node.replace_input_with(place, value)
