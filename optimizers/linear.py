"""Finds the linear layers of a graph: MatMul or Gemm with a constant two-dimensional weight, and the bias after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.edits import replace_value
from onnxpress.optimizers.matching import attribute, name_of, optional


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

    @property
    def product(self) -> ir.Node:
        """The MatMul or Gemm."""
        return next(node for node in self.nodes if node.op_type in ("MatMul", "Gemm"))

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


def stacked_left(graph: Graph) -> tuple[str, ...]:
    """A remark on weights that several layers have in one constant, experts' for instance, where they are a twentieth of a graph and more."""
    products = [node for node in graph.model.graph if node.op_type in ("MatMul", "Gather")]
    read = {value for node in products for value in node.inputs if value is not None and _is_float_constant(value)}
    stacks = [value for value in read if len(_dimensions(value)) == 3]
    share = 4 * sum(map(_elements, stacks)) / max(graph.weight_bytes(), 1)
    if share < 0.05:
        return ()
    return (
        f"{len(stacks)} stacks of weights (experts, most likely), {100 * share:.0f} % of all, stay in float: no operator here reads them",
    )


def replace(graph: Graph, linear: Linear, new_nodes: list[ir.Node]) -> None:
    """Put new nodes in a linear layer's place; the last one's first output takes over the layer's output."""
    body = graph.model.graph
    last = new_nodes[-1].outputs[0]
    # Files of other exporters leave types out; what is contrib's no inference finds again.
    last.shape, last.type = linear.output.shape, linear.output.type or linear.weight.type
    body.insert_before(linear.nodes[-1], new_nodes)
    replace_value(graph, linear.output, last)
    body.remove(list(reversed(linear.nodes)), safe=True)


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
    name = name_of(node)
    return Linear(name=name, x=x, weight=weight, transposed=transposed, bias=bias, output=output, nodes=tuple(nodes))


def _from_gemm(node: ir.Node) -> Linear | None:
    x, weight = node.inputs[0], node.inputs[1]
    bias = optional(node, 2)
    plain = attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0
    if x is None or weight is None or not plain or attribute(node, "transA", 0) or not _is_float_matrix(weight):
        return None
    transposed = bool(attribute(node, "transB", 0))
    width = _dimensions(weight)[0 if transposed else 1]
    if bias is not None and not (_is_float_constant(bias) and _dimensions(bias) == (width,)):
        return None
    name = name_of(node)
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
