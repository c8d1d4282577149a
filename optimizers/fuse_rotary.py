"""Rotary embeddings of queries and keys are left to the attention that reads them.

    q' = RotaryEmbedding(q, positions, cos, sin), k' = RotaryEmbedding(k, positions, cos, sin)
    GroupQueryAttention(q', k', v, …)   →   GroupQueryAttention(q, k, v, …, cos, sin, positions), do_rotary=1

Both have to be turned alike, and read by that attention alone. Kernels that are not told how many new tokens each row has (CUDA's)
count the positions themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.coverage import Miss, coverage
from onnxpress.optimizers.edits import set_input
from onnxpress.optimizers.matching import attribute, optional

_TABLE_STEP = 8
_COSINES, _SINES, _POSITIONS, _NEW_TOKENS = 7, 8, 9, 16  # inputs of GroupQueryAttention


@dataclass(frozen=True, kw_only=True)
class FuseRotary:
    """No options."""

    name: ClassVar[str] = "fuse-rotary"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Fuse. `changes` counts the attentions."""
        count, misses = 0, []
        for attention in list(graph.model.graph):
            if attention.op_type != "GroupQueryAttention" or attribute(attention, "do_rotary", 0):
                continue
            query, key = (value.producer() if value is not None else None for value in attention.inputs[:2])
            reason = _obstacle(query, key)
            if query is None or key is None or reason:
                misses.append(Miss(node=attention, reason=reason))
                continue
            _, positions, cosines, sines = query.inputs
            told = optional(attention, _NEW_TOKENS) is not None
            for index, value in ((_COSINES, cosines), (_SINES, sines), (_POSITIONS, positions if told else None)):
                set_input(attention, index, value)
            for index, rotary in enumerate((query, key)):
                attention.replace_input_with(index, rotary.inputs[0])
            attention.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
            interleaved = attribute(query, "interleaved", 0)
            attention.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", interleaved)
            count += 1
        if count:
            RemoveUnusedNodesPass()(graph.model)
        notes = coverage(count, misses, what="GroupQueryAttention", into="GroupQueryAttention with rotary embeddings")
        return PassResult(graph=graph, changes=count, notes=notes)


def _obstacle(query: ir.Node | None, key: ir.Node | None) -> str:
    """Why an attention keeps its inputs as they are, or nothing."""
    for node, what in ((query, "query"), (key, "key")):
        if node is None or node.op_type != "RotaryEmbedding":
            return f"its {what} is not turned by a RotaryEmbedding"
        if len(node.outputs[0].uses()) != 1:
            return f"its turned {what} is read elsewhere too"
    assert query is not None
    assert key is not None
    if list(query.inputs[1:]) != list(key.inputs[1:]):
        return "query and key are turned by different tables or positions"
    tables = query.inputs[2]
    width = None if tables is None or tables.shape is None else tables.shape[1]
    if not isinstance(width, int) or width % _TABLE_STEP:
        return f"its tables are {width} wide; the attention takes multiples of {_TABLE_STEP}"
    if attribute(query, "interleaved", 0) != attribute(key, "interleaved", 0):
        return "query and key are turned in different ways"
    return ""
