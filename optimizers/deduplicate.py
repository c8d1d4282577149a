"""Equal work is done once: equal nodes on equal inputs are one node, equal constants one constant.

    a = Cast(mask), b = Cast(mask)   →   a = b = Cast(mask)

Nodes that draw random numbers are never merged (the library's pass knows them).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult


@dataclass(frozen=True, kw_only=True)
class Deduplicate:
    """No options."""

    name: ClassVar[str] = "deduplicate"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Merge. `changes` counts nodes and constants that are gone."""
        before = _size(graph)
        _merge_constants(graph.model.graph)
        CommonSubexpressionEliminationPass()(graph.model)
        RemoveUnusedNodesPass()(graph.model)
        return PassResult(graph=graph, changes=before - _size(graph))


def _merge_constants(graph: ir.Graph) -> None:
    """By content. onnx_ir's own pass refuses weights that are transposed views."""
    kept: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.is_graph_output() or value.is_graph_input() or tensor.dtype == ir.DataType.STRING:
            continue
        array = np.ascontiguousarray(tensor.numpy())
        key = (tensor.dtype, array.shape, hashlib.sha256(array.data if array.size else b"").digest())
        if key in kept:
            ir.convenience.replace_all_uses_with(value, kept[key])
            del graph.initializers[name]
        else:
            kept[key] = value


def _size(graph: Graph) -> int:
    return sum(1 for _ in graph.model.graph.all_nodes()) + len(graph.model.graph.initializers)
