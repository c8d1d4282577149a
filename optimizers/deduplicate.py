"""Equal work is done once: equal nodes on equal inputs are one node, equal constants one constant.

    a = Cast(mask), b = Cast(mask)   →   a = b = Cast(mask)

A node inside an If or Loop may be replaced by an equal one outside. Never merged: nodes that draw random numbers,
operators of other domains (they may keep state), nodes that hold subgraphs, and outputs of a graph. onnx_ir's own
passes are not used: they merge Bernoulli and training Dropout, and refuse weights that are transposed views.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult

_CORNER = 8  # elements along each axis that are compared before a weight is read in full
RANDOM = frozenset(
    {
        "Bernoulli",
        "Dropout",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)


@dataclass(frozen=True, kw_only=True)
class Deduplicate:
    """No options."""

    name: ClassVar[str] = "deduplicate"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Merge. `changes` counts nodes and constants that are gone."""
        before = _size(graph)
        for body in graph.model.graphs():
            merge_constants(body)
        _merge_nodes(graph.model.graph, {})
        RemoveUnusedNodesPass()(graph.model)
        return PassResult(graph=graph, changes=before - _size(graph))


def merge_constants(graph: ir.Graph) -> None:
    """By content, which is read only where another constant has the same type, shape and first corner."""
    alike: defaultdict[Hashable, list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.is_graph_output() or value.is_graph_input() or tensor.dtype == ir.DataType.STRING:
            continue
        array = tensor.numpy()
        corner = array[tuple(slice(_CORNER) for _ in array.shape)]
        alike[tensor.dtype, array.shape, _digest(corner)].append(value)
    for values in alike.values():
        kept: dict[bytes, ir.Value] = {}
        for value in values if len(values) > 1 else ():
            assert value.const_value is not None
            first = kept.setdefault(_digest(value.const_value.numpy()), value)
            if first is not value:
                ir.convenience.replace_all_uses_with(value, first)
                del graph.initializers[str(value.name)]


def _merge_nodes(graph: ir.Graph, seen: dict[Hashable, ir.Node]) -> None:
    """seen: what has been computed before, here and in the graphs around this one."""
    for node in list(graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _merge_nodes(attribute.as_graph(), dict(seen))
            elif attribute.type == ir.AttributeType.GRAPHS:
                for body in attribute.as_graphs():
                    _merge_nodes(body, dict(seen))
        key = _key(node)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is not node and not any(output.is_graph_output() for output in node.outputs):
            ir.convenience.replace_all_uses_with(node.outputs, first.outputs)
            graph.remove(node, safe=True)


def _key(node: ir.Node) -> Hashable | None:
    """Equal for nodes that compute the same; None for nodes that are never merged."""
    if node.domain != "" or node.op_type in RANDOM:
        return None
    attributes = []
    for name, attribute in sorted(node.attributes.items()):
        content: Hashable
        if attribute.is_ref():
            return None
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype == ir.DataType.STRING:
                return None
            content = (tensor.dtype, tuple(tensor.shape), _digest(tensor.numpy()))
        elif attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
            content = tuple(attribute.value)
        elif attribute.type in (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING):
            content = attribute.value
        else:
            return None
        attributes.append((name, attribute.type, content))
    named = tuple(bool(output.name) for output in node.outputs)  # an optional output that is left out has no name
    return (node.op_type, node.overload, tuple(id(value) for value in node.inputs), tuple(attributes), named)


def _digest(array: npt.NDArray[Any]) -> bytes:
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.sha256(content.data).digest()


def _size(graph: Graph) -> int:
    return sum(1 for _ in graph.model.graph.all_nodes()) + len(graph.model.graph.initializers)
