"""One standard Attention operator for softmax attention as PyTorch's exporters write it.

    q, k, v = Transpose(Reshape(·), 0 2 1 3)         (batch, heads, length, head_dim)
    p = Softmax(MatMul(q, kᵀ) * scale + mask)
    Reshape(Transpose(MatMul(p, v), 0 2 1 3))    →   Attention(·, ·, ·, mask) on (batch, length, heads * head_dim)

Also an Attention on four axes between such Transposes (what PyTorch's exporter writes at opset 23) → the form above.
The mask becomes one that is added, (batch or 1, heads or 1, query length, key length): ONNX Runtime's CPU kernel
broadcasts no other axes. Layers that read one mask share the result. Attention is an operator since opset 23.

A walk backwards from each Softmax, without a rewrite-rule engine: scale, mask and the transposition of the keys are
each optional, in several spellings and at several places, which as patterns would be hundreds of combinations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.coverage import Miss, coverage
from onnxpress.optimizers.edits import insert, replace_value
from onnxpress.optimizers.heads import Heads, merged_heads, merges, split_heads, split_keys, swapped_last_axes
from onnxpress.optimizers.masks import Mask, MaskBuilder
from onnxpress.optimizers.matching import (
    attribute,
    body_nodes,
    carries_cache,
    dimension,
    is_last_axis,
    only_user,
    operands,
    optional,
    produced_by,
    scalar,
)
from onnxpress.optimizers.opset import refused_opset

_OPSET = 23
_DEEPEST = 4  # nodes between a Softmax and the product of queries and keys
_NEGLIGIBLE = -1e4  # a score this low has weight 0 beside any other: exp(-1e4) is 0 in float32
_ABSORBING = -1e20  # what is added to a number this low leaves it as it is


@dataclass(frozen=True, kw_only=True)
class FuseAttention:
    """No options."""

    name: ClassVar[str] = "fuse-attention"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Fuse. `changes` counts the Attention operators made."""
        matches, misses = _find(graph)
        if matches:
            if refused := refused_opset(graph, _OPSET):
                return PassResult(graph=graph, changes=0, notes=refused)
            matches, misses = _find(graph)
        masks = MaskBuilder(graph)
        for match in matches:
            _rewrite(graph, match, masks)
        if matches:
            graph.model.graph.sort()  # a mask that layers share stands at the first one rewritten
            RemoveUnusedNodesPass()(graph.model)
        kinds = sorted({match.anchor.op_type for match in matches} | {miss.node.op_type for miss in misses})
        what = " and ".join("4-D Attention" if kind == "Attention" else kind for kind in kinds)
        into = "3-D Attention" if kinds == ["Attention"] else "Attention"
        return PassResult(graph=graph, changes=len(matches), notes=coverage(len(matches), misses, what=what, into=into))


@dataclass(frozen=True, kw_only=True)
class _Match:
    """masks: what is added to the scores. attributes: of the Attention operator, beside the numbers of heads.

    merged: the answer as (batch, length, heads, head_dim).
    """

    anchor: ir.Node
    query: Heads
    key: Heads
    value: Heads
    masks: tuple[Mask, ...]
    attributes: dict[str, int | float]
    merged: ir.Value


@dataclass(kw_only=True)
class _Scores:
    """What a Softmax reads, taken apart: MatMul(query, keyᵀ) * scale + masks."""

    product: ir.Node
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)


def _find(graph: Graph) -> tuple[list[_Match], list[Miss]]:
    matches, misses = [], []
    for node in body_nodes(graph, "Softmax", "Attention"):
        if node.op_type == "Softmax":
            weighted = _weighted_values(node)
            if weighted is None:
                continue
            found = _match_softmax(graph, node, weighted)
        elif "q_num_heads" in node.attributes:
            continue
        else:
            found = _match_attention(node)
        if isinstance(found, Miss):
            misses.append(found)
        else:
            matches.append(found)
    return matches, misses


def _weighted_values(softmax: ir.Node) -> ir.Node | None:
    """The MatMul that a Softmax feeds, past Where(IsNaN(p), 0, p), which rows without any key pass through."""
    weights = softmax.outputs[0]
    users = {use.node.op_type: use.node for use in weights.uses() if use.node.domain == ""}
    if set(users) == {"IsNaN", "Where"} and len(weights.uses()) == 2 and not weights.is_graph_output():
        where = users["Where"]
        if (
            where.inputs[0] is users["IsNaN"].outputs[0]
            and scalar(where.inputs[1]) == 0.0
            and where.inputs[2] is weights
        ):
            weights = where.outputs[0]
    for use in weights.uses():
        if use.node.domain == "" and use.node.op_type == "MatMul" and use.idx == 0:
            return use.node
    return None


def _match_softmax(graph: Graph, softmax: ir.Node, weighted: ir.Node) -> _Match | Miss:
    default_axis = -1 if graph.model.opset_imports.get("", 1) >= 13 else 1
    if not is_last_axis(attribute(softmax, "axis", default_axis), softmax.inputs[0]):
        return Miss(node=softmax, reason="it is not over the last axis", steps=0)
    assert weighted.inputs[0] is not None
    if only_user(weighted.inputs[0], "MatMul") is None:
        return Miss(node=softmax, reason="its weights are used elsewhere too", steps=1)
    scores = _scores(softmax)
    if isinstance(scores, Miss):
        return scores
    query, query_scale = _without_scale(scores.product.inputs[0])
    key, key_scale = _without_scale(scores.product.inputs[1])
    unscaled, inner_scale = _without_scale(swapped_last_axes(key))
    scale = scores.scale * query_scale * key_scale * inner_scale
    if scale <= 0:
        return Miss(node=softmax, reason=f"its scale is {scale}", steps=3)
    return _assemble(
        softmax,
        split_heads(query),
        split_keys(key) if unscaled is None else split_heads(unscaled),
        split_heads(weighted.inputs[1]),
        weighted,
        masks=tuple(scores.masks),
        attributes={"scale": scale},
    )


def _match_attention(attention: ir.Node) -> _Match | Miss:
    if carries_cache(attention):
        return Miss(node=attention, reason="it carries past keys and values", steps=0)
    mask = optional(attention, 3)
    hidden = -math.inf if mask is not None and mask.dtype == ir.DataType.BOOL else None
    kept = ("scale", "is_causal", "softcap", "softmax_precision")
    return _assemble(
        attention,
        split_heads(attention.inputs[0]),
        split_heads(attention.inputs[1]),
        split_heads(attention.inputs[2]),
        attention,
        masks=() if mask is None else (Mask(value=mask, fill=hidden, exact=True),),
        attributes={name: attribute(attention, name, None) for name in kept if name in attention.attributes},
    )


def _assemble(
    anchor: ir.Node,
    query: Heads | str,
    key: Heads | str,
    value: Heads | str,
    last: ir.Node,
    *,
    masks: tuple[Mask, ...],
    attributes: dict[str, int | float],
) -> _Match | Miss:
    """Check what stands around the attention proper: heads split before, merged after."""
    for heads, what in ((query, "queries"), (key, "keys"), (value, "values")):
        if isinstance(heads, str):
            return Miss(node=anchor, reason=f"the {what} {heads}", steps=4)
    assert not isinstance(query, str)
    assert not isinstance(key, str)
    assert not isinstance(value, str)
    grouped = anchor.op_type == "Attention" and query.number % key.number == 0
    if query.size != key.size or key.number != value.number or not (query.number == key.number or grouped):
        return Miss(node=anchor, reason="its queries, keys and values differ in heads", steps=5)
    if any(heads.source.dtype != ir.DataType.FLOAT for heads in (query, key, value)):
        return Miss(node=anchor, reason="its queries, keys and values are not all known to be float32", steps=5)
    if (
        _differ(query.source, key.source, 0)
        or _differ(key.source, value.source, 0)
        or _differ(key.source, value.source, 1)
    ):
        return Miss(node=anchor, reason="its queries, keys and values may differ in batch or length", steps=5)
    merged = merged_heads(last.outputs[0], query, value.size)
    if merged is None:
        return Miss(node=anchor, reason="what it gives is not transposed back to (batch, length, heads, ·)", steps=6)
    return _Match(anchor=anchor, query=query, key=key, value=value, masks=masks, attributes=attributes, merged=merged)


def _differ(first: ir.Value, second: ir.Value, axis: int) -> bool:
    """Whether two sizes are known and not equal."""
    sizes = dimension(first, axis), dimension(second, axis)
    return None not in sizes and sizes[0] != sizes[1]


def _scores(softmax: ir.Node) -> _Scores | Miss:
    """Walk from a Softmax back to the product of queries and keys."""
    current = softmax.inputs[0]
    masks: list[Mask] = []
    scale = 1.0
    while True:
        if current is None or only_user(current, "Softmax", "Add", "Where", "Mul", "Div") is None:
            return Miss(node=softmax, reason="its scores are used elsewhere too", steps=2)
        node = produced_by(current, "MatMul", "Add", "Where", "Mul", "Div")
        if node is None:
            return Miss(node=softmax, reason="what it reads is no product of queries and keys", steps=2)
        if node.op_type == "MatMul":
            if len(masks) > 1 and any(mask.fill is not None and mask.fill > _ABSORBING for mask in masks):
                return Miss(node=softmax, reason="it hides scores by a number to which others are added", steps=2)
            return _Scores(product=node, scale=scale, masks=masks)
        if node.op_type in ("Mul", "Div"):
            unscaled, factor = _without_one_scale(node)
            if unscaled is None:
                return Miss(
                    node=softmax, reason=f"its scores are scaled by something not constant in {node.name}", steps=2
                )
            current, scale = unscaled, scale * factor
        elif scale != 1.0:
            return Miss(node=softmax, reason=f"its mask is scaled together with its scores in {node.name}", steps=2)
        elif node.op_type == "Add":
            first, second = node.inputs[0], node.inputs[1]
            if first is None or second is None:
                return Miss(node=softmax, reason="its mask is missing", steps=2)
            if _leads_to_product(first):
                current, mask = first, second
            else:
                current, mask = second, first
            masks.insert(0, Mask(value=mask))
        else:
            condition, kept, other = node.inputs[0], node.inputs[1], node.inputs[2]
            inverted = scalar(kept) is not None
            fill = scalar(kept if inverted else other)
            if condition is None or fill is None or fill > _NEGLIGIBLE:
                return Miss(
                    node=softmax, reason=f"{node.name} does not mask scores by a large negative number", steps=2
                )
            masks.insert(0, Mask(value=condition, fill=fill, inverted=inverted))
            current = other if inverted else kept


def _leads_to_product(value: ir.Value | None, depth: int = 0) -> bool:
    """Whether a value is a MatMul, perhaps scaled, filled or added to."""
    node = produced_by(value, "MatMul", "Add", "Where", "Mul", "Div")
    if node is None or depth == _DEEPEST:
        return False
    return node.op_type == "MatMul" or any(_leads_to_product(operand, depth + 1) for operand in node.inputs)


def _without_scale(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """A value and the constant that it is multiplied by (1.0 where there is none)."""
    node = produced_by(value, "Mul", "Div")
    if node is None or value is None:
        return value, 1.0
    unscaled, factor = _without_one_scale(node)
    return (value, 1.0) if unscaled is None else (unscaled, factor)


def _without_one_scale(node: ir.Node) -> tuple[ir.Value | None, float]:
    if node.op_type == "Mul":
        split = operands(node)
        return (None, 1.0) if split is None else split
    divisor = scalar(node.inputs[1])
    return (node.inputs[0], 1 / divisor) if divisor else (None, 1.0)


def _rewrite(graph: Graph, match: _Match, masks: MaskBuilder) -> None:
    """Put an Attention in, and let it stand for the Reshapes that merge the heads; others read it in their shape."""
    before = match.merged.producer()
    query, key, value = match.query, match.key, match.value
    assert before is not None
    inputs = [query.source, key.source, value.source]
    if match.masks:
        inputs.append(masks.build(match.masks, query.source, key.source, before=before))
    name = f"{match.anchor.outputs[0].name}_attention"
    shape = [dimension(query.source, 0), dimension(query.source, 1), query.number * value.size]
    attention = insert(
        before,
        "Attention",
        inputs,
        {"q_num_heads": query.number, "kv_num_heads": key.number, **match.attributes},
        name=name,
        dtype=ir.DataType.FLOAT,
        shape=shape,
    )
    for use in list(match.merged.uses()):
        if use.node.op_type == "Reshape" and use.node.domain == "" and merges(use.node, query, value.size):
            replace_value(graph, use.node.outputs[0], attention)
    if match.merged.uses() or match.merged.is_graph_output():
        split = masks.constant(f"{name}_heads", np.array([0, 0, query.number, value.size], dtype=np.int64))
        apart = insert(
            before,
            "Reshape",
            [attention, split],
            name=f"{name}_apart",
            dtype=ir.DataType.FLOAT,
            shape=match.merged.shape,
        )
        replace_value(graph, match.merged, apart)
