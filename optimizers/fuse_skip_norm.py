"""One operator for a residual sum and the norm after it.

    s = Add(x, residual), y = SimplifiedLayerNormalization(s, w)
        →   y, _, _, s = SkipSimplifiedLayerNormalization(x, residual, w)

Both operands have to be of one shape. Its sibling with a mean, SkipLayerNormalization, is slower than its parts on CPUs
(targets.py) and is not made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.coverage import Miss, coverage
from onnxpress.optimizers.edits import replace_value
from onnxpress.optimizers.matching import attribute


@dataclass(frozen=True, kw_only=True)
class FuseSkipNorm:
    """No options."""

    name: ClassVar[str] = "fuse-skip-norm"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Fuse. `changes` counts the operators made."""
        count, misses = 0, []
        for norm in list(graph.model.graph):
            if norm.op_type != "SimplifiedLayerNormalization":
                continue
            reason = _obstacle(norm)
            if reason:
                misses.append(Miss(node=norm, reason=reason))
                continue
            _fuse(graph, norm)
            count += 1
        if count:
            graph.model.graph.opset_imports.setdefault("com.microsoft", 1)
            RemoveUnusedNodesPass()(graph.model)
            graph.model.graph.sort()  # a reader of the sum may stand before the norm
        notes = coverage(count, misses, what="SimplifiedLayerNormalization", into="SkipSimplifiedLayerNormalization")
        return PassResult(graph=graph, changes=count, notes=notes)


def _obstacle(norm: ir.Node) -> str:
    """Why a norm is not fused, or nothing."""
    total = norm.inputs[0]
    add = None if total is None else total.producer()
    if total is None or add is None or add.op_type != "Add" or add.domain != "":
        return "its input is no sum"
    if attribute(norm, "axis", -1) != -1 or len(norm.outputs) > 1:
        return "it does not norm the last axis alone"
    if add.graph is not norm.graph or total.is_graph_output():
        return "the sum is the graph's output, or another graph's"
    one, other = (value.shape for value in add.inputs if value is not None)
    if one is None or other is None or list(one) != list(other) or len(one) != 3:
        return "the summands are not both (batch, length, hidden)"
    return ""


def _fuse(graph: Graph, norm: ir.Node) -> None:
    total = norm.inputs[0]
    assert total is not None
    add = total.producer()
    assert add is not None
    fused = ir.Node(
        "com.microsoft",
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, norm.inputs[1]],
        [ir.AttrFloat32("epsilon", attribute(norm, "epsilon", 1e-5))],
        num_outputs=4,
        name=f"{norm.outputs[0].name}_skip",
    )
    normed, mean, inverse, summed = fused.outputs
    mean.name = inverse.name = ""  # not computed
    for new, old in ((normed, norm.outputs[0]), (summed, total)):
        new.shape, new.type = old.shape, old.type
    graph.model.graph.insert_before(norm, fused)
    replace_value(graph, norm.outputs[0], normed)
    replace_value(graph, total, summed)
