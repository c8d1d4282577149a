"""Self-attention together with its projections, as the CUDA provider has it fused.

    MultiHeadAttention(x Wq + bq, x Wk + bk, x Wv + bv, –, lengths)   →   com.microsoft.Attention(x, [Wq Wk Wv], [bq bk bv], lengths)

One product in the place of three and one kernel for the biases and the split. The weights are then no linear layers any more that
passes of quantization find, so that this belongs to the precisions without them.
Source of the operator: ONNX Runtime's ContribOperators.md, Attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.coverage import Miss, coverage
from onnxpress.optimizers.edits import drop_unused_constants, replace_node
from onnxpress.optimizers.linear import Linear, linears
from onnxpress.optimizers.matching import attribute, optional
from onnxpress.optimizers.pack_projections import packed, why_not_packed

_KEPT = ("num_heads", "scale")  # attributes that both operators have
_LENGTHS = 4  # input of MultiHeadAttention; it has to be the only one beside query, key and value


@dataclass(frozen=True, kw_only=True)
class PackAttention:
    """No options."""

    name: ClassVar[str] = "pack-attention"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Pack. `changes` counts the attentions."""
        by_output = {id(linear.output): linear for linear in linears(graph)}
        count, misses = 0, []
        for attention in list(graph.model.graph):
            if attention.op_type != "MultiHeadAttention" or attention.domain != "com.microsoft":
                continue
            found = [part for value in attention.inputs[:3] if (part := by_output.get(id(value))) is not None]
            reason = why_not_packed(found) or _obstacle(attention, found)
            if reason:
                misses.append(Miss(node=attention, reason=reason, steps=len(found)))
                continue
            _pack(graph, attention, found)
            count += 1
        if count:
            RemoveUnusedNodesPass()(graph.model)
            drop_unused_constants(graph)
        notes = coverage(count, misses, what="MultiHeadAttention", into="Attention with its projections")
        return PassResult(graph=graph, changes=count, notes=notes)


def _obstacle(attention: ir.Node, parts: list[Linear]) -> str:
    if any(output.uses() or output.is_graph_output() for output in attention.outputs[1:]):
        return "it gives keys and values, too"
    if other := sorted(set(attention.attributes) - set(_KEPT)):
        return f"it has {', '.join(other)}"
    given = [index for index, value in enumerate(attention.inputs) if index > 2 and value is not None]
    if given not in ([], [_LENGTHS]):
        return "it has more inputs than the lengths of rows"
    if len({part.weight_array().shape for part in parts}) > 1:
        return "queries, keys and values are of different widths"
    return ""


def _pack(graph: Graph, attention: ir.Node, parts: list[Linear]) -> None:
    _, weight, bias = packed(graph, parts)
    lengths = optional(attention, _LENGTHS)
    attributes = {key: attribute(attention, key, None) for key in _KEPT if key in attention.attributes}
    new = ir.node(
        "Attention",
        [parts[0].x, weight, bias, *([] if lengths is None else [lengths])],
        attributes,
        domain="com.microsoft",
        name=attention.name,
    )
    replace_node(graph, attention, new)
