"""Constant folding and clean-up: what can be computed once is, what does nothing or is read by nobody goes.

    Constant → Cast → Add(x, ·)               →   Add(x, constant)
    Shape(x) → Slice, where the size is known →   constant
    BatchNormalization(Conv(x, w, b))         →   Conv(x, w', b'), ConvTranspose too
    Transpose(Transpose(x)), Reshape(Reshape(x)), Cast to the same type, Reshape to the same shape   →   at most one

Shapes are inferred first, symbolic ones too, also through the shape arithmetic that exporters write; later passes
read them. Functions are inlined. Weights stay where they are: nothing larger than `limit` elements is computed, but a convolution's
weights that take a batch normalization in, so neither the file nor memory grows, and weights of more than 2 GB are never part of a protobuf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    no_op_expand_rule,
    no_op_transpose_rule,
    reshape_reshape_rule,
    transpose_transpose_rule,
)

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.edits import add_constant
from onnxpress.optimizers.shapes import elements, infer_shapes

_ROUNDS = 3  # folding makes shapes known, which makes more foldable; two rounds were enough for every graph so far
_SHAPE_OPERATORS = ("Shape", "Slice", "Gather", "Concat", "Squeeze", "Unsqueeze")


@dataclass(frozen=True, kw_only=True)
class Fold:
    """limit: the most elements that a folded constant, or what it is computed from, may have."""

    name: ClassVar[str] = "fold"
    lossless: ClassVar[bool] = True

    limit: int = 1024

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise RecipeError(f"The limit of fold is a number of elements from 1 on, not {self.limit}.")

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Fold and clean up. `changes` counts the nodes that are gone, whatever came in their place."""
        model = graph.model
        before = _nodes(model)
        if model.functions:
            # A function of another opset stays one: its operators may be others of the same name.
            InlinePass(
                criteria=lambda function: all(
                    model.opset_imports.get(domain, version) == version
                    for domain, version in function.opset_imports.items()
                )
            )(model)
            RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        # Shape inference goes through a protobuf, which small constants may enter but weights must not.
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        LiftSubgraphInitializersToMainGraphPass()(model)
        for _ in range(_ROUNDS):
            count = len(_nodes(model))
            self._fold(graph)
            if len(_nodes(model)) == count:
                break
        RemoveUnusedOpsetsPass()(model)
        return PassResult(graph=graph, changes=len(before - _nodes(model)))

    def _fold(self, graph: Graph) -> None:
        model = graph.model
        infer_shapes(model)
        _fold_known_shapes(graph)
        optimizer.fold_constants(
            model, input_size_limit=self.limit, output_size_limit=self.limit, should_fold=self._unless_large
        )
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        LiftSubgraphInitializersToMainGraphPass()(model)
        RewritePass(
            [
                fuse_batchnorm_into_conv_rule,
                fuse_batchnorm_into_conv_transpose_rule,
                transpose_transpose_rule,
                no_op_transpose_rule,
                reshape_reshape_rule,
                no_op_expand_rule,
            ]
        )(model)
        for node in list(model.graph.all_nodes()):
            if node.domain == "" and (node.op_type == "Identity" or _keeps_shape(node)):
                _bypass(node)
        RemoveUnusedNodesPass()(model)

    def _unless_large(self, node: ir.Node) -> bool | None:
        """False for what reads a weight, of which the library would compute a transposed copy, and for text, on which it fails."""
        given = [value for value in node.inputs if value is not None]
        tensors = (ir.convenience.get_const_tensor(value) for value in given)
        large = any(tensor is not None and tensor.size > self.limit for tensor in tensors)
        return False if large or any(value.dtype == ir.DataType.STRING for value in (*given, *node.outputs)) else None


def _fold_known_shapes(graph: Graph) -> None:
    """Replace shape arithmetic by a constant where all its entries are known numbers."""
    for node in list(graph.model.graph.all_nodes()):
        if node.domain != "" or node.op_type not in _SHAPE_OPERATORS or node.outputs[0].is_graph_output():
            continue
        value = node.outputs[0]
        if value.dtype != ir.DataType.INT64 or value.shape is None or len(value.shape) > 1 or not value.uses():
            continue
        found = elements(value)
        numbers = [entry for entry in found or () if isinstance(entry, int)]
        if found is None or len(numbers) != len(found) or (len(value.shape) == 0 and len(found) != 1):
            continue
        array = np.array(numbers, dtype=np.int64).reshape(() if len(value.shape) == 0 else (-1,))
        constant = add_constant(graph, f"{value.name}_known", array)
        ir.convenience.replace_all_uses_with(value, constant)


def _keeps_shape(node: ir.Node) -> bool:
    """Whether a Reshape gives the shape that it gets."""
    if node.op_type != "Reshape" or node.inputs[0] is None:
        return False
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if before is None or after is None or len(before) != len(after):
        return False
    unnamed = any(isinstance(size, ir.SymbolicDim) and size.value is None for size in before)
    return not unnamed and list(before) == list(after)


def _bypass(node: ir.Node) -> None:
    """Let a node's first input stand for its output, where that keeps every graph's outputs made in that graph."""
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    if output.is_graph_output():
        producer = source.producer()
        body = output.graph
        if producer is None or producer.graph is not body or source.is_graph_output() or body is None:
            return
        name = output.name
        output.name = f"{name}_bypassed"
        source.name = name
        for index in [index for index, value in enumerate(body.outputs) if value is output]:
            body.outputs[index] = source
    source.type = source.type or output.type
    source.shape = source.shape or output.shape
    ir.convenience.replace_all_uses_with(output, source)


def _nodes(model: ir.Model) -> set[ir.Node]:
    return {node for node in model.graph.all_nodes() if node.op_type != "Constant"}
