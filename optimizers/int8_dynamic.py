"""int8 linear layers whose activation scale is found anew at each call, and int8 embedding tables.

    y = MatMul(x, w) + b     →   y = DynamicQuantizeMatMul(x, w8, scales, zero_points, b)
    y = MoE(x, routing, …)   →   y = QMoE(x, routing, blocks, scales, …)      (experts.py)

Needs no calibration data. The scale is one for the whole tensor, so an answer moves with its batch-mates: the gate
measures how far. In a language model's step whose rows have unequal numbers of new tokens, attention leaves whatever was in memory at the
padding, which must not decide the scale: it becomes zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.edits import add_constant, drop_unused_constants, put_behind, unused_name
from onnxpress.optimizers.experts import quantize_experts, routers
from onnxpress.optimizers.linear import convolutions_left, linears, replace, stacked_left
from onnxpress.optimizers.rounding import blocks
from onnxpress.optimizers.weights import Weights8Bit, quantize_embeddings


@dataclass(frozen=True, kw_only=True)
class Int8Dynamic:
    """Dynamic int8, per-channel weights. minimum_elements: weights smaller than this stay in float."""

    name: ClassVar[str] = "int8-dynamic"
    lossless: ClassVar[bool] = False

    minimum_elements: int = 1024

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Quantize every linear layer, embedding table and mixture of experts but those in `context.keep`."""
        left = convolutions_left(graph) + stacked_left(graph)
        tied, touched = quantize_embeddings(graph, bits=8, preferred_block=128, keep=context.keep)
        count = 0
        weights = Weights8Bit(graph, limit=context.target.qdq.weight_limit)
        routing = routers(graph)
        for layer in linears(graph):
            tensor = layer.weight.const_value
            if layer.name in context.keep | routing or tensor is None or tensor.size < self.minimum_elements:
                continue
            inputs = [layer.x, *weights.of(layer)]
            if layer.bias is not None:
                inputs.append(layer.bias)
            replace(graph, layer, [ir.node("DynamicQuantizeMatMul", inputs, domain="com.microsoft", name=layer.name)])
            touched += (layer.name,)
            count += 1
        experts = quantize_experts(graph, blocks, bits=8, preferred_block=128, keep=context.keep, target=context.target)
        touched += experts.touched
        _zero_padding(graph)
        drop_unused_constants(graph)
        graph.model.graph.opset_imports.setdefault("com.microsoft", 1)
        notes = (f"{count} linear layers, {tied.tables} embedding tables",)
        return PassResult(
            graph=graph,
            changes=len(touched),
            notes=notes + tied.notes + experts.notes + left,
            touched=touched,
        )


def _zero_padding(graph: Graph) -> None:
    """Put zeros where a language model's attention has padding."""
    body = graph.model.graph
    inputs = {value.name: value for value in body.inputs}
    attentions = [node for node in body if node.op_type == "GroupQueryAttention"]
    if not attentions or "lengths" not in inputs or "input_ids" not in inputs:
        return
    zero = add_constant(graph, "padding_zero", np.array(0, np.float32))
    one = add_constant(graph, "padding_step", np.array(1, np.int64))
    start = add_constant(graph, "padding_start", np.array(0, np.int64))
    last = add_constant(graph, "padding_last_axis", np.array([-1], np.int64))
    length = ir.node("Shape", [inputs["input_ids"]], {"start": 1, "end": 2})
    scalar = ir.node("Squeeze", [length.outputs[0]])
    places = ir.node("Range", [start, scalar.outputs[0], one])
    counts = ir.node("Cast", [inputs["lengths"]], {"to": ir.DataType.INT64})
    column = ir.node("Unsqueeze", [counts.outputs[0], last])  # (rows, 1)
    real = ir.node("Less", [places.outputs[0], column.outputs[0]])  # (rows, length)
    each = ir.node("Unsqueeze", [real.outputs[0], last])
    steps = [length, scalar, places, counts, column, real, each]
    for number, node in enumerate(steps):
        node.name = f"padding_{number}"
        node.outputs[0].name = unused_name(body, f"padding_{number}")
    body.insert_before(attentions[0], steps)
    for attention in attentions:
        found = attention.outputs[0]
        where = ir.node("Where", [each.outputs[0], found, zero], name=f"{attention.name}_without_padding")
        put_behind(graph, found, where)
