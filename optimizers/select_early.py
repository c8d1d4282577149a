"""A token that alone is read is taken before the operators that treat each token by itself.

    Gather(MatMul(x, w), 0, axis=1)   →   Gather(MatMul(Gather(x, [0], axis=1), w), 0, axis=1)

Many classifiers, and embeddings of the first token, read one token of the last layer. Its attention, what comes behind it and the
feed-forward block are then computed for that token, keys and values for all as before: the same numbers, fewer of them.

Not for tokens whose place is computed, nor past attention that is not one operator: there the token is taken behind it. Queries are
computed for all tokens too: what scales norms (smooth, AWQ) scales those that linear layers alone read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.dependencies import ELEMENTWISE, MASK, NORMS, mask_of
from onnxpress.optimizers.edits import add_constant, drop_unused_constants, insert
from onnxpress.optimizers.matching import attribute, body_nodes, constant, dimension, is_last_axis, optional, rank

_TOKENS = 1  # the axis of (batch, tokens, width)
Reader = tuple[ir.Node, int]  # a node and which of its inputs


@dataclass(frozen=True, kw_only=True)
class SelectEarly:
    """No options."""

    name: ClassVar[str] = "select-early"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Move selections. `changes` counts the matrix products that have one token left."""
        products = sum(_move(graph, node) for node in body_nodes(graph, "Gather") if _position(node) is not None)
        if products:
            drop_unused_constants(graph)
        notes = (f"{products} products are computed for one token, the only one that is read",) if products else ()
        return PassResult(graph=graph, changes=products, notes=notes)


def _position(selection: ir.Node) -> int | None:
    """The constant position of the one token that a Gather takes."""
    index = constant(selection.inputs[1])
    axis = attribute(selection, "axis", 0)
    if rank(selection.inputs[0]) != 3 or axis not in (_TOKENS, _TOKENS - 3) or index is None or index.ndim:
        return None
    return int(index)


def _move(graph: Graph, selection: ir.Node) -> int:
    """Take the token as early as can be; how many products have one token then."""
    order = {node: place for place, node in enumerate(graph.model.graph)}
    source = selection.inputs[0]
    assert source is not None
    wanted: dict[ir.Value, set[Reader]] = {source: {(selection, 0)}}
    narrowed: dict[ir.Node, tuple[int, ...]] = {}
    for node in reversed(list(order)[: order[selection]]):
        read = {(use.node, use.idx) for output in node.outputs for use in output.uses()}
        rows = (
            _rows(node)
            if read and read == {reader for output in node.outputs for reader in wanted.get(output, ())}
            else ()
        )
        if not rows or any(output.is_graph_output() for output in node.outputs):
            continue
        narrowed[node] = rows
        for index in rows:
            value = node.inputs[index]
            assert value is not None
            wanted.setdefault(value, set()).add((node, index))
    for node in [node for node in narrowed if node.op_type == "MatMul"]:
        x = node.inputs[0]
        assert x is not None
        if {(use.node, use.idx) for use in x.uses()} != wanted[x]:  # a query, whose keys read the same
            del narrowed[node]
            wanted[x].discard((node, 0))
    products = sum(node.op_type == "MatMul" for node in narrowed)
    if not products:
        return 0
    position = add_constant(graph, f"{source.name}_position", np.array([_position(selection)], np.int64))
    for value, readers in wanted.items():
        if readers and value.producer() not in narrowed:
            _take(value, readers, position, _TOKENS, order)
    for node in narrowed:
        mask = mask_of(node)
        if mask is not None and dimension(mask, -2) != 1:
            _take(mask, {(node, MASK[node.op_type])}, position, len(mask.shape or ()) - 2, order)
        for output in node.outputs:
            if output.shape is not None and rank(output) == 3:
                output.shape = ir.Shape([*output.shape[:_TOKENS], 1, *output.shape[_TOKENS + 1 :]])
    first = add_constant(graph, f"{source.name}_first", np.array(0, np.int64))
    selection.replace_input_with(1, first)
    return products


def _rows(node: ir.Node) -> tuple[int, ...]:
    """Which inputs have a row for each token, if an output's row comes from theirs alone; none otherwise."""
    first = node.inputs[0] if node.inputs else None
    if (
        first is None
        or node.domain not in ("", "com.microsoft")
        or any(rank(output) != 3 for output in node.outputs if output.uses())
    ):
        return ()
    if dimension(node.outputs[0], _TOKENS) == 1:
        return ()  # there is but one
    if node.op_type in NORMS or node.op_type == "Split":
        last = is_last_axis(attribute(node, "axis", 0 if node.op_type == "Split" else -1), first)
        # Scales, and not another one for each token.
        alike = all(rank(value) == 1 for value in node.inputs[1:] if value is not None)
        return (0,) if last and alike and rank(first) == 3 else ()
    if node.op_type == "MatMul":
        weight = constant(node.inputs[1])
        return (0,) if rank(first) == 3 and weight is not None and weight.ndim == 2 else ()
    if node.op_type in MASK:
        return (0,) if _attends_row_by_row(node) else ()
    if node.op_type not in ELEMENTWISE:
        return ()
    tokens = dimension(node.outputs[0], _TOKENS)
    rows = []
    for index, value in enumerate(node.inputs):
        axes = rank(value)
        if value is None or (axes is not None and (axes < 2 or (axes < 4 and dimension(value, -2) == 1))):
            continue  # the same for all tokens
        if axes != 3 or tokens is None or dimension(value, _TOKENS) != tokens:
            return ()
        rows.append(index)
    return tuple(rows)


def _attends_row_by_row(node: ir.Node) -> bool:
    """Whether a token's answer needs no more of the queries than its own, and no more of the mask than a row of it."""
    causal = attribute(node, "is_causal", 0) or attribute(node, "unidirectional", 0)
    past = {"Attention": (4, 5), "MultiHeadAttention": (6, 7)}[node.op_type]
    apart = all(rank(optional(node, place)) == 3 for place in range(3))
    if causal or not apart or any(optional(node, place) is not None for place in past):
        return False
    padding = optional(node, 4) if node.op_type == "MultiHeadAttention" else None
    if padding is not None and rank(padding) not in (1, 2):
        return False  # another one for each query
    mask = mask_of(node)
    return mask is None or (rank(mask) or 0) >= 2


def _take(value: ir.Value, readers: set[Reader], position: ir.Value, axis: int, order: dict[ir.Node, int]) -> None:
    """Let readers have one position of a value's axis."""
    shape = None if value.shape is None else ir.Shape([*value.shape[:axis], 1, *value.shape[axis + 1 :]])
    before = min((node for node, _ in readers), key=order.__getitem__)
    taken = insert(
        before, "Gather", [value, position], {"axis": axis}, name=f"{value.name}_taken", dtype=value.dtype, shape=shape
    )
    for node, index in readers:
        node.replace_input_with(index, taken)
