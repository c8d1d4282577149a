"""Finds where attention heads are split from the last axis, and where they are put together again.

    (batch, length, heads * head_dim) → Reshape → (batch, length, heads, head_dim) → Transpose → (batch, heads, ·, ·)

Elements are conserved, so when the last axis is split exactly and one of the others is kept, the other is too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.graph import Graph
from onnxpress.optimizers.edits import insert, replace_value
from onnxpress.optimizers.matching import attribute, body_nodes, dimension, only_user, produced_by, rank
from onnxpress.optimizers.shapes import Size, reshaped, size

HEADS_FIRST = (0, 2, 1, 3)  # (batch, length, heads, head_dim) → (batch, heads, length, head_dim), and back
KEYS_TRANSPOSED = (0, 2, 3, 1)  # (batch, length, heads, head_dim) → (batch, heads, head_dim, length)
_SHAPE_OPERATORS = ("Gather", "Slice", "Squeeze", "Unsqueeze", "Cast", "Concat")


@dataclass(frozen=True, kw_only=True)
class Heads:
    """source: (batch, length, number * size)."""

    source: ir.Value
    number: int
    size: int


def split_heads(value: ir.Value | None, permutation: Sequence[int] = HEADS_FIRST) -> Heads | str:
    """The heads that a value is made of; or, as the end of a sentence, what is wrong with it."""
    transpose = produced_by(value, "Transpose")
    reshape = None if transpose is None else produced_by(transpose.inputs[0], "Reshape")
    if transpose is None or reshape is None or tuple(attribute(transpose, "perm", ())) != tuple(permutation):
        return "are not a Transpose of a Reshape to (batch, length, heads, head_dim)"
    source, target = reshape.inputs[0], reshaped(reshape)
    width = dimension(source, -1)
    if source is None or rank(source) != 3 or not isinstance(width, int) or target is None or len(target) != 4:
        return "are not split from (batch, length, width) with a known width"
    number, head_dim = target[2], target[3]
    if number is None and isinstance(head_dim, int):
        number = width // head_dim
    if head_dim is None and isinstance(number, int):
        head_dim = width // number
    if not isinstance(number, int) or not isinstance(head_dim, int) or number * head_dim != width:
        return "have an unknown number or size of heads"
    if not _is(target, [size(source, 0), size(source, 1), number, head_dim]):
        return f"may mix batch and length in {reshape.name}"
    return Heads(source=source, number=number, size=head_dim)


def split_keys(value: ir.Value | None) -> Heads | str:
    """As `split_heads`, for keys that stand transposed: (batch, heads, head_dim, length)."""
    keys = swapped_last_axes(value)
    return split_heads(value, KEYS_TRANSPOSED) if keys is None else split_heads(keys)


def merged_heads(value: ir.Value, query: Heads, head_dim: int) -> ir.Value | None:
    """(batch, length, heads, head_dim) where (batch, heads, length, head_dim) is turned into that, to be merged.

    value: has the batch, heads and length of the query; it may pass a Reshape that changes nothing.
    """
    batch, length = size(query.source, 0), size(query.source, 1)
    reshape = _only_reshape(value)
    if reshape is not None:
        target = reshaped(reshape)
        own = [size(value, axis) for axis in range(4)]
        if target is None or not _is(target, [batch, query.number, length, head_dim], own):
            return None
        value = reshape.outputs[0]
    transpose = only_user(value, "Transpose")
    if transpose is None or tuple(attribute(transpose, "perm", ())) != HEADS_FIRST:
        return None
    return transpose.outputs[0]


def swap_last_axes(graph: Graph) -> None:
    """Write each swap of the last two of four axes that goes by way of three axes as one Transpose."""
    for node in body_nodes(graph, "Reshape"):
        output = node.outputs[0]
        source = swapped_last_axes(output)
        if source is not None:
            swapped = insert(
                node,
                "Transpose",
                [source],
                {"perm": (0, 1, 3, 2)},
                name=f"{output.name}_swapped",
                dtype=output.dtype,
                shape=output.shape,
            )
            replace_value(graph, output, swapped)
    RemoveUnusedNodesPass()(graph.model)


def _only_reshape(value: ir.Value) -> ir.Node | None:
    """The Reshape that alone reads a value, beside what computes its target from the value's shape."""
    found: set[ir.Node] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        for use in current.uses():
            allowed = ("Reshape", "Shape") if current is value else ("Reshape", *_SHAPE_OPERATORS)
            if use.node.domain != "" or use.node.op_type not in allowed or current.is_graph_output():
                return None
            if use.node.op_type == "Reshape":
                found.add(use.node)
            else:
                pending.append(use.node.outputs[0])
    reshape = found.pop() if len(found) == 1 else None
    return reshape if reshape is not None and reshape.inputs[0] is value else None


def merges(reshape: ir.Node, query: Heads, head_dim: int) -> bool:
    """Whether a Reshape of (batch, length, heads, head_dim) gives (batch, length, heads * head_dim)."""
    target = reshaped(reshape)
    wanted = [size(query.source, 0), size(query.source, 1), query.number * head_dim]
    return target is not None and _is(target, wanted)


def _is(sizes: Sequence[Size | None], *wanted: Sequence[Size]) -> bool:
    """Whether a Reshape's sizes are those wanted, each by one of its names.

    A Reshape conserves the number of elements, so one size may be unknown when all others are as wanted.
    """
    if any(len(sizes) != len(names) for names in wanted):
        return False
    matches = [entry in names for entry, *names in zip(sizes, *wanted, strict=True)]
    return matches.count(False) <= 1


def swapped_last_axes(value: ir.Value | None) -> ir.Value | None:
    """v where the value is v with its last two of four axes swapped, by a Transpose or by way of three axes."""
    node = produced_by(value, "Transpose", "Reshape")
    if node is None:
        return None
    if node.op_type == "Transpose":
        return node.inputs[0] if tuple(attribute(node, "perm", ())) == (0, 1, 3, 2) else None
    transpose = produced_by(node.inputs[0], "Transpose")
    flatten = None if transpose is None else produced_by(transpose.inputs[0], "Reshape")
    if transpose is None or flatten is None or tuple(attribute(transpose, "perm", ())) != (0, 2, 1):
        return None
    source, flat, target = flatten.inputs[0], reshaped(flatten), reshaped(node)
    if source is None or rank(source) != 4 or flat is None or target is None:
        return None
    batch, heads, length, head_dim = (size(source, axis) for axis in range(4))
    whole = len(flat) == 3 and flat[1:] == [length, head_dim]
    return source if whole and _is(target, [batch, heads, head_dim, length]) else None
