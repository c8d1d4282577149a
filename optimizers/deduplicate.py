"""Equal work is done once: equal nodes on equal inputs are one node, equal constants one constant.

    a = Cast(mask), b = Cast(mask)   →   a = b = Cast(mask)

Nodes that draw random numbers are never merged (the library's pass knows them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateHashedInitializersPass,
    RemoveUnusedNodesPass,
)

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
        DeduplicateHashedInitializersPass()(graph.model)
        CommonSubexpressionEliminationPass()(graph.model)
        RemoveUnusedNodesPass()(graph.model)
        return PassResult(graph=graph, changes=before - _size(graph))


def _size(graph: Graph) -> int:
    return sum(1 for _ in graph.model.graph.all_nodes()) + len(graph.model.graph.initializers)
