"""int8 linear layers whose activation scale is found anew at each call, and int8 embedding tables.

    y = MatMul(x, w) + b   →   y = DynamicQuantizeMatMul(x, w8, scales, zero_points, b)

Needs no calibration data. The scale is one for the whole tensor, so an answer moves with its batch-mates: the gate
measures how far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.linear import add_constant, drop_unused_constants, linears, replace
from onnxpress.optimizers.rounding import per_channel_8bit
from onnxpress.optimizers.weights import quantize_embeddings


@dataclass(frozen=True, kw_only=True)
class Int8Dynamic:
    """Dynamic int8, per-channel weights. minimum_elements: weights smaller than this stay in float."""

    name: ClassVar[str] = "int8-dynamic"
    lossless: ClassVar[bool] = False

    minimum_elements: int = 1024

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Quantize every linear layer and embedding table but those in `context.keep`."""
        tied, touched = quantize_embeddings(graph, bits=8, preferred_block=128, keep=context.keep)
        count = 0
        for layer in linears(graph):
            tensor = layer.weight.const_value
            if layer.name in context.keep or tensor is None or tensor.size < self.minimum_elements:
                continue
            integers, scales, zero_points = per_channel_8bit(
                layer.weight_array(), reduce_range=context.target.reduce_range
            )
            inputs = [
                layer.x,
                add_constant(graph, f"{layer.name}_weight_8bit", integers),
                add_constant(graph, f"{layer.name}_weight_scale", scales),
                add_constant(graph, f"{layer.name}_weight_zero_point", zero_points),
            ]
            if layer.bias is not None:
                inputs.append(layer.bias)
            replace(graph, layer, [ir.node("DynamicQuantizeMatMul", inputs, domain="com.microsoft", name=layer.name)])
            touched += (layer.name,)
            count += 1
        drop_unused_constants(graph)
        graph.model.graph.opset_imports.setdefault("com.microsoft", 1)
        notes = (f"{count} linear layers, {tied.tables} embedding tables",)
        return PassResult(graph=graph, changes=len(touched), notes=notes + tied.notes, touched=touched)
