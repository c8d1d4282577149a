"""The scale of an attention goes into its queries, where it costs nothing.

    GroupQueryAttention(x Wq + bq, …), scale=s   →   GroupQueryAttention(x (s Wq) + s bq, …), scale=1

ONNX Runtime multiplies one query by the keys with a kernel for vectors only where no factor is left to apply; with one it copies the
keys into the form for matrices first, in every step (mlas/lib/sgemm.cpp, the case of M = 1). For heads of 64 and 256 numbers the
scale is a power of two, so that nothing is rounded otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.coverage import Miss, coverage
from onnxpress.optimizers.edits import add_constant, drop_unused_constants, insert
from onnxpress.optimizers.linear import Linear, linears
from onnxpress.optimizers.matching import attribute, constant

_NORMS = ("SimplifiedLayerNormalization", "LayerNormalization")
_COMMUTING = ("Reshape", "Transpose", "RotaryEmbedding")  # with a factor of their first input


@dataclass(frozen=True, kw_only=True)
class ScaleQueries:
    """No options."""

    name: ClassVar[str] = "scale-queries"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Scale. `changes` counts the attentions."""
        by_output = {id(linear.output): linear for linear in linears(graph)}
        count, misses = 0, []
        for attention in list(graph.model.graph):
            if attention.op_type != "GroupQueryAttention" or attribute(attention, "scale", 0.0) == 1.0:
                continue
            scale = attribute(attention, "scale", 0.0)  # 0 stands for the root of the heads' width
            if attention.inputs[1] is None or not scale:
                reason = "it gives no scale" if not scale else "its projections are packed"
                misses.append(Miss(node=attention, reason=reason))
                continue
            _scale(graph, attention, np.float32(scale), by_output)
            attention.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
            count += 1
        if count:
            drop_unused_constants(graph)
        notes = coverage(count, misses, what="GroupQueryAttention", into="GroupQueryAttention of scaled queries")
        return PassResult(graph=graph, changes=count, notes=notes)


def _scale(graph: Graph, attention: ir.Node, scale: np.float32, by_output: dict[int, Linear]) -> None:
    """Multiply an attention's queries: by the weights of the layer or the norm that makes them, else by a node."""
    query = attention.inputs[0]
    assert query is not None
    nodes, weights = _weights(query, by_output)
    for weight in weights:
        assert weight.const_value is not None
        scaled = add_constant(graph, f"{weight.name}_scaled", weight.const_value.numpy() * scale)
        for node in nodes:
            for index, value in enumerate(node.inputs):
                if value is weight:
                    node.replace_input_with(index, scaled)
    if not weights:
        factor = add_constant(graph, "attention_scale", np.asarray(scale))
        shape, dtype = query.shape, query.dtype
        value = insert(attention, "Mul", [query, factor], name=f"{query.name}_scaled", dtype=dtype, shape=shape)
        attention.replace_input_with(0, value)


def _weights(value: ir.Value, by_output: dict[int, Linear]) -> tuple[tuple[ir.Node, ...], list[ir.Value]]:
    """The nodes and the constants of the last layer or norm whose output a value is, turned and in other shapes; nothing if read elsewhere."""
    while len(value.uses()) == 1:
        node, linear = value.producer(), by_output.get(id(value))
        if linear is not None:
            weights = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
            # A matrix that several layers share would be there twice.
            return linear.nodes, weights if len(linear.weight.uses()) == 1 else []
        if node is None:
            break
        if node.op_type in _NORMS:
            weights = [weight for weight in node.inputs[1:] if weight is not None]
            return (node,), weights if all(constant(weight) is not None for weight in weights) else []
        if node.op_type not in _COMMUTING or node.inputs[0] is None:
            break
        value = node.inputs[0]
    return (), []
