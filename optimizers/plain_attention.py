"""Attention spelled in matrix products and a softmax, for compilers that know it so and not as one operator.

    Attention(q, k, v, mask)   →   Softmax(q kᵀ · scale + mask) v, each head by itself

OpenVINO's provider for ONNX Runtime leaves Attention (opset 23) to the CPU provider, and cuts the graph in two at each; it finds this
form and fuses it by itself. Source of the operator: ONNX's operator Attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.coverage import Miss, coverage
from onnxpress.optimizers.edits import add_constant, insert, replace_value
from onnxpress.optimizers.matching import attribute, body_nodes, carries_cache, dimension, name_of, optional, rank

_HIDDEN = -3e4  # beside any other score its weight is 0; half precision holds it


@dataclass(frozen=True, kw_only=True)
class PlainAttention:
    """No options."""

    name: ClassVar[str] = "plain-attention"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Rewrite. `changes` counts the attentions."""
        misses, count = [], 0
        masks: dict[ir.Value, ir.Value] = {}  # of the operator → to be added
        for attention in body_nodes(graph, "Attention"):
            if reason := _obstacle(attention):
                misses.append(Miss(node=attention, reason=reason))
                continue
            _rewrite(graph, attention, masks)
            count += 1
        notes = coverage(count, misses, what="Attention", into="matrix products")
        return PassResult(graph=graph, changes=count, notes=notes)


def _obstacle(attention: ir.Node) -> str:
    """Why an attention stays as it is, or nothing."""
    if carries_cache(attention):
        return "it carries past keys and values"
    if any(attribute(attention, name, 0) for name in ("softcap", "softmax_precision")):
        return "it bounds its scores, or has a softmax of another precision"
    if None in (_heads(attention, place) for place in range(3)):
        return "the number or the size of its heads is not known"
    return ""


def _heads(attention: ir.Node, place: int) -> tuple[int, int] | None:
    """Number and size of the heads of the queries (0), keys (1) or values (2), where known."""
    value = attention.inputs[place]
    width = dimension(value, -1)
    if rank(value) == 4:
        count = dimension(value, 1)
    else:
        count = attribute(attention, "kv_num_heads" if place else "q_num_heads", None)
    if not isinstance(width, int) or not isinstance(count, int):
        return None
    return count, width if rank(value) == 4 else width // count


def _rewrite(graph: Graph, attention: ir.Node, masks: dict[ir.Value, ir.Value]) -> None:
    name, output = name_of(attention), attention.outputs[0]
    dtype = output.dtype
    assert dtype is not None

    def put(op_type: str, inputs: list[ir.Value | None], **attributes: object) -> ir.Value:
        return insert(attention, op_type, inputs, attributes, name=f"{name}_{op_type.lower()}", dtype=dtype)

    def numbers(what: str, *of: int) -> ir.Value:
        return add_constant(graph, f"{name}_{what}", np.array(of, np.int64))

    def scalar(what: str, number: float) -> ir.Value:
        return add_constant(graph, f"{name}_{what}", np.array(number, dtype.numpy()))

    query, key, value = (_heads(attention, place) for place in range(3))
    assert query is not None
    assert key is not None
    assert value is not None

    def apart(place: int, count: int, size: int, *, last: list[int]) -> ir.Value:
        """(batch, heads, tokens, size), as many heads as the queries have, or transposed by `last`."""
        x = attention.inputs[place]
        assert x is not None
        if rank(x) == 4:
            heads = x
        else:
            split = put("Reshape", [x, numbers("apart", 0, 0, count, size)])
            heads = put("Transpose", [split], perm=[0, 2, 1, 3])
        if count != query[0]:
            fifth = put("Unsqueeze", [heads, numbers("axis", 2)])
            shared = put("Expand", [fifth, numbers("shares", 1, 1, query[0] // count, 1, 1)])
            heads = put("Reshape", [shared, numbers("shared", 0, query[0], -1, size)])
        return heads if last == [2, 3] else put("Transpose", [heads], perm=[0, 1, *last])

    scale = attribute(attention, "scale", 1 / math.sqrt(query[1]))
    scaled = put("Mul", [apart(0, *query, last=[2, 3]), scalar("scale", scale)])
    scores = put("MatMul", [scaled, apart(1, *key, last=[3, 2])])
    mask = optional(attention, 3)
    if mask is not None:
        if mask not in masks:
            hidden = scalar("hidden", _HIDDEN)
            if mask.dtype == ir.DataType.BOOL:
                masks[mask] = put("Where", [mask, scalar("seen", 0), hidden])
            else:
                masks[mask] = put("Max", [mask, hidden])
            masks[mask].shape = mask.shape
        scores = put("Add", [scores, masks[mask]])
    if attribute(attention, "is_causal", 0):
        shape = insert(attention, "Shape", [scores], {"start": 2}, name=f"{name}_shape", dtype=ir.DataType.INT64)
        hidden = put("Expand", [scalar("hidden", _HIDDEN), shape])
        scores = put("Add", [scores, put("Trilu", [hidden, add_constant(graph, f"{name}_one", np.array(1))], upper=1)])
    answer = put("MatMul", [put("Softmax", [scores], axis=-1), apart(2, *value, last=[2, 3])])
    if rank(attention.inputs[0]) != 4:
        turned = put("Transpose", [answer], perm=[0, 2, 1, 3])
        answer = put("Reshape", [turned, numbers("together", 0, 0, query[0] * value[1])])
    answer.shape = output.shape
    replace_value(graph, output, answer)
    graph.model.graph.remove(attention, safe=True)
