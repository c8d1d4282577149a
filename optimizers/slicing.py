"""Cuts channels and heads out of a graph: all that depends on them, which `dependencies` has found, becomes smaller at once.

    y = MatMul(Gelu(MatMul(x, up)), down)   →   the same with channel c gone from the columns of `up` and the rows of `down`

Edits constants and attributes. Which positions to lose is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.dependencies import (
    ELEMENTWISE,
    FOLDED,
    MASK,
    NORMS,
    SINK,
    Group,
    mask_of,
    part_ranges,
    sink_of,
    weight_axes,
    whole_blocks,
    with_heads,
)
from onnxpress.optimizers.edits import add_constant, insert, replace_constant, replace_everywhere
from onnxpress.optimizers.matching import attribute, constant, dimension, optional, produced_by, rank
from onnxpress.pruned import Heads

_END = np.iinfo(np.int64).max


def cut(graph: Graph, group: Group) -> dict[str, dict[int, frozenset[int]]]:
    """Make every value of a group smaller: weights, biases, sizes in Reshape, Split and Slice, numbers of heads.

    What weights lost is given, by name and axis.
    """
    nodes = dict.fromkeys(
        node
        for value in group.cuts
        for node in (value.producer(), *(use.node for use in value.uses()))
        if node is not None and node not in group.heads
    )
    weights = _weights(nodes, group)
    for node in nodes:
        _edit(graph, node, group.cuts)
    for weight, axes in weights.items():
        array = constant(weight)
        assert array is not None
        for axis, lost in axes.items():
            array = np.delete(array, sorted(lost), axis=axis)
        replace_everywhere(graph, weight, array)
    for node, heads in group.heads.items():
        _edit_heads(graph, node, heads, group)
    for value, (axis, lost) in group.cuts.items():
        size = None if axis == FOLDED else dimension(value, axis)
        if value.shape is not None and isinstance(size, int):
            sizes = list(value.shape)
            sizes[axis] = size - len(lost)
            value.shape = ir.Shape(sizes)
    return {str(weight.name): axes for weight, axes in weights.items()}


def _weights(nodes: Iterable[ir.Node], group: Group) -> dict[ir.Value, dict[int, frozenset[int]]]:
    """What weights of linear layers and tables lose along each axis, once for all that share them."""
    weights: dict[ir.Value, dict[int, frozenset[int]]] = {}
    for node in nodes:
        for value in (node.inputs[0], node.outputs[0]):
            if value is not None and value in group.cuts:
                axis, lost = group.cuts[value]
                for weight, place in weight_axes(node, value, axis):
                    weights.setdefault(weight, {})[place] = lost
    return weights


def _edit_heads(graph: Graph, node: ir.Node, heads: Heads, group: Group) -> None:
    """The numbers of heads that an attention operator is told, a score for each, and a mask that is the same for each."""
    key, _, block = with_heads(node, heads)[1]
    gone = {position // block for position in group.cuts[key][1]}
    left = heads.groups - len(gone)
    if sink_of(node) is not None:
        _shrink(graph, node, SINK, 0, whole_blocks(gone, heads.queries))
    query_name = "q_num_heads" if node.op_type == "Attention" else "num_heads"
    if query_name in node.attributes:
        node.attributes[query_name] = ir.AttrInt64(query_name, left * heads.queries)
        if "kv_num_heads" in node.attributes:
            node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", left)
    mask = mask_of(node)
    if mask is not None and (rank(mask) or 0) > 2 and not isinstance(dimension(mask, -3), int):
        # The same for each head, of which it has one or all.
        bounds = (0, left * heads.queries, (rank(mask) or 0) - 3)
        ends = [add_constant(graph, f"{mask.name}_bound", np.array([bound], np.int64)) for bound in bounds]
        part = insert(node, "Slice", [mask, *ends], name=f"{mask.name}_heads", dtype=mask.dtype, shape=mask.shape)
        node.replace_input_with(MASK[node.op_type], part)


def _edit(graph: Graph, node: ir.Node, cuts: Mapping[ir.Value, tuple[int, frozenset[int]]]) -> None:
    """Change one node's constants and attributes, with the values still described as they were before."""
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    if node.op_type == "Gemm" and output in cuts:  # its weight is cut for all that read it
        bias = optional(node, 2)
        if bias is not None and dimension(bias, -1) != 1:
            _shrink(graph, node, 2, len(bias.shape or ()) - 1, cuts[output][1])
    elif (node.op_type in ELEMENTWISE or node.op_type == "MatMul") and output in cuts:
        axis, lost = cuts[output]
        for index, value in enumerate(node.inputs):
            array = constant(value)
            if node.op_type == "MatMul" and (array is None or axis >= (rank(output) or 0) - 2):
                continue
            place = -1 if array is None else axis - (rank(output) or 0) + array.ndim
            if array is not None and place >= 0 and array.shape[place] != 1:
                _shrink(graph, node, index, place, lost)
    elif node.op_type in NORMS and output in cuts and cuts[output][0] == (rank(output) or 0) - 1:
        _shrink(graph, node, 1, 0, cuts[output][1])
    elif node.op_type == "RotaryEmbedding" and output in cuts and "num_heads" in node.attributes:
        axis, lost = cuts[output]
        width, heads = dimension(output, axis), int(attribute(node, "num_heads", 0))
        if heads and isinstance(width, int):
            node.attributes["num_heads"] = ir.AttrInt64("num_heads", heads * (width - len(lost)) // width)
    elif node.op_type == "GatherElements" and cuts.get(output, (0,))[0] == FOLDED:
        # Indices are the same for each head and row: as many as there are now.
        first = add_constant(graph, f"{output.name}_first", np.array([0], np.int64))
        shape = insert(node, "Shape", [source], name=f"{output.name}_sizes", dtype=ir.DataType.INT64)
        here = insert(node, "Gather", [shape, first], name=f"{output.name}_rows", dtype=ir.DataType.INT64)
        indices = node.inputs[1]
        assert indices is not None
        bounds = [first, here, first]
        part = insert(node, "Slice", [indices, *bounds], name=f"{output.name}_indices", dtype=indices.dtype)
        node.replace_input_with(1, part)
    elif node.op_type in ("Reshape", "Expand") and output in cuts and cuts[output][0] != FOLDED:
        _edit_target(graph, node, *cuts[output])
    elif node.op_type == "Split" and source in cuts:
        axis, lost = cuts[source]
        along, ranges = part_ranges(node)
        if along == axis:
            sizes = [end - start - len([item for item in lost if start <= item < end]) for start, end in ranges]
            node.attributes.pop("num_outputs", None)
            node.resize_inputs(2)
            node.replace_input_with(1, add_constant(graph, f"{node.outputs[0].name}_sizes", np.array(sizes, np.int64)))
    elif node.op_type == "Slice" and source in cuts:
        axis, lost = cuts[source]
        axes = constant(optional(node, 3))
        if axes is not None and axis not in [int(item) % (rank(source) or 1) for item in axes.reshape(-1)]:
            return  # along another axis, whose bounds need not be known
        along, [(start, end)] = part_ranges(node)
        if along == axis:
            for place, bound in ((1, start), (2, end)):
                left = bound - len([item for item in lost if item < bound])
                node.replace_input_with(place, add_constant(graph, f"{output.name}_bound", np.array([left], np.int64)))


def _edit_target(graph: Graph, node: ir.Node, axis: int, lost: frozenset[int]) -> None:
    """Lower the number in a Reshape's or Expand's target that stands for the axis; -1, 0 and what is broadcast follow by themselves."""
    target, output = node.inputs[1], node.outputs[0]
    size, name = dimension(output, axis), f"{output.name}_shape"
    array = constant(target)
    assert target is not None
    assert isinstance(size, int)
    if array is not None:
        place = axis - (rank(output) or 0) + len(array)
        if place >= 0 and array[place] == size:
            smaller = array.copy()
            smaller[place] -= len(lost)
            node.replace_input_with(1, add_constant(graph, name, smaller))
        return
    concat = produced_by(target, "Concat")
    parts: list[ir.Value | None] = list(concat.inputs) if concat is not None else []
    before: Sequence[ir.Value | None]
    after: Sequence[ir.Value | None]
    if len(parts) == rank(output) and all(dimension(part, 0) == 1 for part in parts):
        entry = constant(parts[axis])
        if entry is not None and entry.reshape(-1)[0] != size:
            return
        before, after = parts[:axis], parts[axis + 1 :]
    else:  # computed in some other way
        bounds = [add_constant(graph, f"{name}_bound", np.array([at], np.int64)) for at in (0, axis, axis + 1, _END)]
        before, after = (
            [insert(node, "Slice", [target, *ends], name=name, dtype=ir.DataType.INT64)]
            for ends in (bounds[:2], bounds[2:])
        )
    now = add_constant(graph, f"{name}_size", np.array([size - len(lost)], np.int64))
    shape = ir.Shape([rank(output) or 0])
    mine = insert(node, "Concat", [*before, now, *after], {"axis": 0}, name=name, dtype=ir.DataType.INT64, shape=shape)
    node.replace_input_with(1, mine)


def _shrink(graph: Graph, node: ir.Node, place: int, axis: int, lost: frozenset[int]) -> None:
    """Give a node a constant without some positions; it keeps its name where nothing else reads it."""
    value = node.inputs[place]
    array = constant(value)
    assert value is not None
    assert array is not None
    replace_constant(graph, node, place, np.delete(array, sorted(lost), axis=axis))
