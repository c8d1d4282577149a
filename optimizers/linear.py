"""Finds the linear layers of a graph: MatMul or Gemm with a constant two-dimensional weight, and the bias after it.

With the small edits that passes share: another node, value or constant in one's place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.graph import Graph


@dataclass(frozen=True, kw_only=True)
class Linear:
    """y = x @ weight + bias.

    weight: initializer, (in, out), or (out, in) when transposed. bias: initializer (out,) or None.
    nodes: all nodes that the layer consists of, the last one gives `output`.
    """

    name: str
    x: ir.Value
    weight: ir.Value
    transposed: bool
    bias: ir.Value | None
    output: ir.Value
    nodes: tuple[ir.Node, ...]

    def weight_array(self) -> npt.NDArray[np.float32]:
        """The weight as float32 (in, out)."""
        tensor = self.weight.const_value
        assert tensor is not None
        array: npt.NDArray[np.float32] = tensor.numpy().astype(np.float32)
        return array.T if self.transposed else array


def linears(graph: Graph) -> Iterator[Linear]:
    """The linear layers of the main graph, in order. Names are unique: the node's, or its output's."""
    for node in list(graph.model.graph):
        if node.domain != "":
            continue
        if node.op_type == "MatMul":
            linear = _from_matmul(node)
        elif node.op_type == "Gemm":
            linear = _from_gemm(node)
        else:
            continue
        if linear is not None:
            yield linear


def embeddings(graph: Graph, *, minimum_elements: int) -> Iterator[ir.Node]:
    """Gather nodes that look rows up in a constant float table of at least `minimum_elements`."""
    for node in list(graph.model.graph):
        if node.op_type == "Gather" and node.domain == "" and attribute(node, "axis", 0) == 0:
            table = node.inputs[0]
            if _is_float_matrix(table) and table is not None and _elements(table) >= minimum_elements:
                yield node


def convolutions_left(graph: Graph) -> tuple[str, ...]:
    """A remark where the larger part of a graph's weights is convolutions', of a graph that is not quantized yet."""
    left = [
        node for node in graph.model.graph.all_nodes() if node.op_type == "Conv" and _is_float_constant(node.inputs[1])
    ]
    size = sum(_elements(node.inputs[1]) * 4 for node in left if node.inputs[1] is not None)
    if 2 * size <= graph.weight_bytes():
        return ()
    return (f"{len(left)} convolutions, which are most of the weights, stay in float: int8-qdq is for them",)


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Value of a node's attribute, or the default where it is absent."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def replace(graph: Graph, linear: Linear, new_nodes: list[ir.Node]) -> None:
    """Put new nodes in a linear layer's place; the last one's first output takes over the layer's output."""
    body = graph.model.graph
    last = new_nodes[-1].outputs[0]
    # Files of other exporters leave types out; what is contrib's no inference finds again.
    last.shape, last.type = linear.output.shape, linear.output.type or linear.weight.type
    body.insert_before(linear.nodes[-1], new_nodes)
    replace_value(graph, linear.output, last)
    body.remove(list(reversed(linear.nodes)), safe=True)


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


def add_constant(graph: Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Register an initializer; where the name is taken, a number is added to it."""
    name = unused_name(graph.model.graph, name)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.model.graph.initializers[name] = value
    return value


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
    insert_behind(graph, value, [node])
    output = node.outputs[0]
    output.name = unused_name(graph.model.graph, str(node.name))
    output.type, output.shape = value.type, value.shape
    if value.is_graph_output():
        replace_value(graph, value, output)
        node.replace_input_with(0, value)
    for user, place in uses:
        user.replace_input_with(place, output)


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


def _from_matmul(node: ir.Node) -> Linear | None:
    x, weight = node.inputs
    if x is None or weight is None:
        return None
    nodes: list[ir.Node] = []
    transposed = False
    producer = weight.producer()
    if producer is not None and producer.op_type == "Transpose" and list(attribute(producer, "perm", (1, 0))) == [1, 0]:
        source = producer.inputs[0]
        assert source is not None
        if len(weight.uses()) == 1:
            nodes.append(producer)
        weight, transposed = source, True
    if not _is_float_matrix(weight):
        return None
    nodes.append(node)
    output, bias = node.outputs[0], None
    uses = output.uses()
    if len(uses) == 1 and not output.is_graph_output():
        consumer = next(iter(uses)).node
        if consumer.op_type == "Add" and consumer.domain == "" and consumer.graph is node.graph:
            other = next((value for value in consumer.inputs if value is not output), None)
            width = _dimensions(weight)[0 if transposed else 1]
            if other is not None and _is_float_constant(other) and _dimensions(other) == (width,):
                nodes.append(consumer)
                output, bias = consumer.outputs[0], other
    name = node.name or str(node.outputs[0].name)
    return Linear(name=name, x=x, weight=weight, transposed=transposed, bias=bias, output=output, nodes=tuple(nodes))


def _from_gemm(node: ir.Node) -> Linear | None:
    x, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
    if x is None or weight is None or not plain or attribute(node, "transA", 0) or not _is_float_matrix(weight):
        return None
    transposed = bool(attribute(node, "transB", 0))
    width = _dimensions(weight)[0 if transposed else 1]
    if bias is not None and not (_is_float_constant(bias) and _dimensions(bias) == (width,)):
        return None
    name = node.name or str(node.outputs[0].name)
    return Linear(
        name=name, x=x, weight=weight, transposed=transposed, bias=bias, output=node.outputs[0], nodes=(node,)
    )


def _is_float_constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.dtype == ir.DataType.FLOAT


def _is_float_matrix(value: ir.Value | None) -> bool:
    return value is not None and _is_float_constant(value) and len(_dimensions(value)) == 2


def _dimensions(value: ir.Value) -> tuple[int, ...]:
    tensor = value.const_value
    assert tensor is not None
    return tuple(tensor.shape.numpy())


def _elements(value: ir.Value) -> int:
    return int(np.prod(_dimensions(value)))
