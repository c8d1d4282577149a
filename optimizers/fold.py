"""Constant folding and clean-up: what can be computed once is, what nobody reads goes.

    Constant → Cast → Add(x, ·)   →   Add(x, constant)

Never folds what would make the file larger: an output of more than `limit` elements is left to run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass
from onnxscript import optimizer

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult


@dataclass(frozen=True, kw_only=True)
class Fold:
    """limit: the most elements that a folded constant may have, unless its inputs have as many."""

    name: ClassVar[str] = "fold"
    lossless: ClassVar[bool] = True

    limit: int = 1024

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Fold and clean up. `changes` counts the nodes that are gone."""
        model = graph.model
        before = sum(1 for _ in model.graph.all_nodes())
        optimizer.fold_constants(model, output_size_limit=self.limit)
        IdentityEliminationPass()(model)
        RemoveUnusedNodesPass()(model)
        RemoveUnusedOpsetsPass()(model)
        after = sum(1 for _ in model.graph.all_nodes())
        return PassResult(graph=graph, changes=before - after)
