"""One MatMul for the projections to queries, keys and values, which the attention then takes apart by itself.

    GroupQueryAttention(x Wq + bq, x Wk + bk, x Wv + bv, …)   →   GroupQueryAttention(x [Wq Wk Wv] + [bq bk bv], …)

Needs rotary embeddings to be the attention's own (fuse-rotary), or none. Encoders keep theirs apart on CPUs: their
attention takes no packed input, and the Split costs what the packing saves (docs/decisions/0008); on CUDA see pack-attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.coverage import Miss, coverage
from onnxpress.optimizers.edits import add_constant, drop_unused_constants
from onnxpress.optimizers.linear import Linear, linears


@dataclass(frozen=True, kw_only=True)
class PackProjections:
    """No options."""

    name: ClassVar[str] = "pack-projections"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Pack. `changes` counts the attentions."""
        by_output = {id(linear.output): linear for linear in linears(graph)}
        count, misses = 0, []
        for attention in list(graph.model.graph):
            if attention.op_type != "GroupQueryAttention" or attention.inputs[1] is None:
                continue
            parts = [by_output.get(id(value)) for value in attention.inputs[:3]]
            found = [part for part in parts if part is not None]
            reason = why_not_packed(found)
            if reason:
                misses.append(Miss(node=attention, reason=reason, steps=len(found)))
                continue
            _pack(graph, attention, found)
            count += 1
        if count:
            RemoveUnusedNodesPass()(graph.model)
            drop_unused_constants(graph)
        notes = coverage(count, misses, what="GroupQueryAttention", into="GroupQueryAttention of packed projections")
        return PassResult(graph=graph, changes=count, notes=notes)


def why_not_packed(parts: list[Linear]) -> str:
    """Why the projections to queries, keys and values cannot be one, or nothing."""
    if len(parts) < 3:
        return "query, key and value do not come from linear layers directly"
    if len({id(part.x) for part in parts}) > 1:
        return "query, key and value are not projections of the same values"
    if any(len(part.output.uses()) != 1 for part in parts):
        return "a projection is read elsewhere too"
    return ""


def packed(graph: Graph, parts: list[Linear]) -> tuple[str, ir.Value, ir.Value]:
    """Name, weight (in, widths of all) and bias (widths of all) of one layer for several; zeros where a layer has no bias."""
    name = f"{parts[0].name.rpartition('.')[0] or parts[0].name}.qkv_proj"
    weights = [part.weight_array() for part in parts]
    biases = [
        np.zeros(weight.shape[1], np.float32)
        if part.bias is None or part.bias.const_value is None
        else part.bias.const_value.numpy()
        for part, weight in zip(parts, weights, strict=True)
    ]
    weight = add_constant(graph, f"{name}.weight", np.concatenate(weights, axis=1))
    return name, weight, add_constant(graph, f"{name}.bias", np.concatenate(biases))


def _pack(graph: Graph, attention: ir.Node, parts: list[Linear]) -> None:
    name, weight, bias = packed(graph, parts)
    product = ir.node("MatMul", [parts[0].x, weight], name=name)
    product.outputs[0].shape, product.outputs[0].type = _widened(parts, weight), parts[0].output.type
    nodes = [product]
    if any(part.bias is not None for part in parts):
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=f"{name}_bias"))
        nodes[1].outputs[0].shape, nodes[1].outputs[0].type = product.outputs[0].shape, product.outputs[0].type
    graph.model.graph.insert_before(attention, nodes)
    attention.replace_input_with(0, nodes[-1].outputs[0])
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)


def _widened(parts: list[Linear], weight: ir.Value) -> ir.Shape | None:
    shape = parts[0].output.shape
    return None if shape is None or weight.shape is None else ir.Shape([*list(shape)[:-1], weight.shape[1]])
