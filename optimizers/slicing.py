"""Cuts channels and heads out of a graph: follows what depends on them through every tensor, then makes all of them smaller.

    y = MatMul(Gelu(MatMul(x, up)), down)   →   the same with channel c gone from the columns of `up` and the rows of `down`

`follow` walks from one axis of one value to every value that has to lose the same positions (a dependency group; DepGraph,
arXiv 2301.12900), until linear layers end the walk. It changes nothing; where a node cannot be followed, it says which.
`cut` then edits all constants and attributes that have to do with a group. Which positions to lose is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.linear import add_constant, attribute
from onnxpress.optimizers.matching import constant, dimension, rank
from onnxpress.pruned import Heads

Cut = tuple[ir.Value, int, frozenset[int]]  # positions along one axis (from the front) of a value

# fmt: off
ELEMENTWISE = frozenset((
    "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", "Gelu", "Relu", "LeakyRelu", "Elu", "Erf", "Sigmoid",
    "Tanh", "Softplus", "HardSwish", "HardSigmoid", "Swish", "Mish", "Silu", "QuickGelu", "FastGelu", "BiasGelu",
    "Exp", "Log", "Sqrt", "Abs", "Neg", "Clip", "Cast", "Identity", "Dropout",
))
# fmt: on
_NORMS = frozenset(("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"))
# Inputs of the attention operators: past keys and values, and those that may hold something for each head.
_PAST = {"GroupQueryAttention": (3, 4), "Attention": (4, 5), "MultiHeadAttention": ()}
_PER_HEAD = {"GroupQueryAttention": (10, 11), "Attention": (3,), "MultiHeadAttention": (3, 5, 6, 7)}


class NotFollowedError(Exception):
    """A node through which a cut cannot be followed."""

    def __init__(self, node: ir.Node | None, why: str) -> None:
        where = "" if node is None else f"{node.name or node.outputs[0].name} ({node.op_type}) "
        super().__init__(f"{where}{why}")


@dataclass(kw_only=True)
class Group:
    """What goes together: positions to lose, by value; the attention operators that lose heads, and how many are left."""

    cuts: dict[ir.Value, tuple[int, frozenset[int]]] = field(default_factory=dict)
    heads: Mapping[ir.Node, Heads] = field(default_factory=dict)


def attention_heads(node: ir.Node) -> Heads | None:
    """The heads of an attention operator with three-dimensional inputs of known width; None for other nodes."""
    if node.op_type not in _PAST:
        return None
    names = ("q_num_heads", "kv_num_heads") if node.op_type == "Attention" else ("num_heads", "kv_num_heads")
    queries = int(attribute(node, names[0], 0))
    groups = int(attribute(node, names[1], 0)) or queries
    widths = [dimension(value, -1) if rank(value) == 3 else None for value in node.inputs[:3]]
    if not queries or queries % groups or not all(isinstance(width, int) for width in widths):
        return None
    query, _, value = (int(width) for width in widths if isinstance(width, int))
    return Heads(groups=groups, queries=queries // groups, size=query // queries, value_size=value // groups)


def follow_heads(node: ir.Node, lost: Sequence[int]) -> Group:
    """Everything that depends on some key-value heads of an attention operator, and on the query heads that read them.

    Raises NotFollowedError.
    """
    heads = attention_heads(node)
    if heads is None:
        raise NotFollowedError(node, "has heads of unknown number or size")
    for place in _PER_HEAD[node.op_type]:
        value = node.inputs[place] if place < len(node.inputs) else None
        if value is not None and rank(value) != 2 and (rank(value) != 4 or dimension(value, 1) != 1):
            raise NotFollowedError(node, f"has numbers of its own for each head ({value.name})")
    query = [head * heads.queries + index for head in lost for index in range(heads.queries)]
    seeds: list[Cut] = []
    for place, which, size in ((0, query, heads.size), (1, lost, heads.size), (2, lost, heads.value_size)):
        value = node.inputs[place]
        if value is None:
            raise NotFollowedError(node, "reads queries, keys and values as one tensor")
        seeds.append((value, 2, _blocks(which, size)))
    seeds.append((node.outputs[0], 2, _blocks(query, heads.value_size)))
    for place in _PAST[node.op_type]:
        past = node.inputs[place] if place < len(node.inputs) else None
        if past is not None:
            seeds.append((past, 1, frozenset(lost)))
    seeds.extend((output, 1, frozenset(lost)) for output in node.outputs[1:3] if output.name)
    return _closure(seeds, {node: heads})


def follow(value: ir.Value, axis: int, lost: frozenset[int]) -> Group:
    """Everything that has to lose the same positions as one axis of a value. Raises NotFollowedError."""
    return _closure([(value, axis, lost)], {})


def cut(graph: Graph, group: Group) -> None:
    """Make every value of a group smaller: weights, biases, sizes in Reshape, Split and Slice, numbers of heads."""
    nodes = dict.fromkeys(
        node
        for value in group.cuts
        for node in (value.producer(), *(use.node for use in value.uses()))
        if node is not None and node not in group.heads
    )
    for node in nodes:
        _edit(graph, node, group.cuts)
    for node, heads in group.heads.items():
        past = group.cuts[node.inputs[1]][1]  # type: ignore[index]
        left = heads.groups - len(past) // heads.size
        query_name = "q_num_heads" if node.op_type == "Attention" else "num_heads"
        node.attributes[query_name] = ir.AttrInt64(query_name, left * heads.queries)
        if "kv_num_heads" in node.attributes:
            node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", left)
    for value, (axis, lost) in group.cuts.items():
        size = dimension(value, axis)
        if value.shape is not None and isinstance(size, int):
            sizes = list(value.shape)
            sizes[axis] = size - len(lost)
            value.shape = ir.Shape(sizes)


def _closure(seeds: Sequence[Cut], heads: Mapping[ir.Node, Heads]) -> Group:
    group = Group(heads=heads)
    pending = list(seeds)
    body = next(iter(seeds[0][0].uses())).node.graph
    fixed = {value for value, *_ in seeds} if heads else set()
    while pending:
        value, axis, lost = pending.pop()
        known_axis, known = group.cuts.get(value, (axis, frozenset()))
        if known_axis != axis:
            raise NotFollowedError(value.producer(), "would lose positions of two axes")
        if lost <= known:
            continue
        group.cuts[value] = (axis, known | lost)
        cached = value in fixed and (value.is_graph_input() or value.is_graph_output())
        if (value.is_graph_output() or value.is_graph_input()) and not cached:
            raise NotFollowedError(value.producer(), f"{value.name} is an input or output of the graph")
        if value.is_initializer():
            raise NotFollowedError(None, f"the constant {value.name} stands where a computed value is expected")
        producer = value.producer()
        if any(use.node.graph is not body for use in value.uses()):
            raise NotFollowedError(producer, f"gives {value.name}, which a subgraph reads")
        for node in dict.fromkeys((*((producer,) if producer else ()), *(use.node for use in value.uses()))):
            if node in heads:
                if value not in fixed:
                    raise NotFollowedError(node, "is reached by another way than its heads")
                continue
            pending.extend(_related(node, value, axis, lost))
    return group


def _related(node: ir.Node, value: ir.Value, axis: int, lost: frozenset[int]) -> Iterator[Cut]:
    """What else of a node loses positions when one of its values does; nothing where a linear layer ends the walk."""
    count, kind = rank(value), node.op_type
    if count is None:
        raise NotFollowedError(node, f"has a value of unknown rank ({value.name})")
    own = [item for item in (*node.inputs, *node.outputs) if item is not None and item.name]
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    if kind == "Shape":
        return
    if kind in ("MatMul", "Gemm"):
        weight = constant(node.inputs[1])
        if weight is None or weight.ndim != 2 or axis != count - 1 or value is node.inputs[1]:
            raise NotFollowedError(node, "multiplies two computed values, or along another axis")
        if len(node.inputs[1].uses()) > 1:  # type: ignore[union-attr]
            raise NotFollowedError(node, f"shares its weight {node.inputs[1].name} with other layers")  # type: ignore[union-attr]
        if kind == "Gemm" and attribute(node, "transA", 0):
            raise NotFollowedError(node, "reads its input transposed")
        return
    if kind in ELEMENTWISE:
        for other in own:
            if other is value or constant(other) is not None:
                continue
            other_rank = rank(other)
            if other_rank is None:
                raise NotFollowedError(node, f"has a value of unknown rank ({other.name})")
            place = axis - count + other_rank
            if place >= 0 and dimension(other, place) != 1:
                yield other, place, lost
        return
    if kind in _NORMS and value in (source, output):
        normalized = attribute(node, "axis", -1) % count
        if axis >= normalized:
            raise NotFollowedError(node, "normalizes over all channels, so that each depends on all others")
        yield (output if value is source else source), axis, lost
        return
    if kind == "RotaryEmbedding" and value in (source, output):
        yield (output if value is source else source), axis, lost
        return
    if kind == "Transpose":
        permutation = list(attribute(node, "perm", range(count)[::-1]))
        yield (output, permutation.index(axis), lost) if value is source else (source, permutation[axis], lost)
        return
    if kind == "Reshape" and value is not node.inputs[1]:
        yield _reshaped(node, value, axis, lost, output if value is source else source)
        return
    if kind == "Concat" and attribute(node, "axis", 0) % count != axis and all(constant(item) is None for item in own):
        yield from ((item, axis, lost) for item in own if item is not value)
        return
    if kind in ("Split", "Slice"):
        yield from _parts(node, value, axis, lost)
        return
    raise NotFollowedError(node, "is no operator that channels can be followed through")


def _reshaped(node: ir.Node, value: ir.Value, axis: int, lost: frozenset[int], other: ir.Value) -> Cut:
    """The same positions on the other side of a Reshape that keeps the axis, splits it into heads, or joins heads to it."""
    size, count, other_rank = dimension(value, axis), rank(value), rank(other)
    if not isinstance(size, int) or count is None or other_rank is None:
        raise NotFollowedError(node, "has an unknown shape")
    last, before = dimension(other, -1), dimension(other, -2)
    inner = dimension(value, -1)
    if axis == count - 1 and last == size:
        return other, other_rank - 1, lost
    if axis == count - 1 and isinstance(last, int) and isinstance(before, int) and last * before == size:
        blocks = {position // last for position in lost}
        if _blocks(sorted(blocks), last) == lost:
            return other, other_rank - 2, frozenset(blocks)
    if axis == count - 2 and isinstance(inner, int) and last == size * inner:
        return other, other_rank - 1, _blocks(sorted(lost), inner)
    raise NotFollowedError(node, "mixes the channels with something else")


def _parts(node: ir.Node, value: ir.Value, axis: int, lost: frozenset[int]) -> Iterator[Cut]:
    along, ranges = part_ranges(node)
    source = node.inputs[0]
    assert source is not None
    if along != axis:
        if value is source:
            yield from ((output, axis, lost) for output in node.outputs)
        else:
            yield source, axis, lost
        return
    if value is source:
        for output, (start, end) in zip(node.outputs, ranges, strict=True):
            inside = frozenset(position - start for position in lost if start <= position < end)
            if inside:
                yield output, axis, inside
    else:
        start, _ = ranges[list(node.outputs).index(value)]
        yield source, axis, frozenset(position + start for position in lost)


def part_ranges(node: ir.Node) -> tuple[int, list[tuple[int, int]]]:
    """The axis of a Split or Slice, and from where to where each of its outputs reaches. Raises NotFollowedError."""
    source = node.inputs[0]
    count = rank(source)
    if count is None:
        raise NotFollowedError(node, "has an unknown shape")
    if node.op_type == "Split":
        axis = attribute(node, "axis", 0) % count
        sizes = [dimension(output, axis) for output in node.outputs]
        if not all(isinstance(size, int) for size in sizes):
            raise NotFollowedError(node, "has parts of unknown size")
        ends = np.cumsum([size for size in sizes if isinstance(size, int)]).tolist()
        return axis, list(zip([0, *ends[:-1]], ends, strict=True))
    starts, finishes, axes, steps = ([*(constant(value) for value in node.inputs[1:5]), None, None])[:4]
    size = None
    if starts is not None and finishes is not None and axes is not None and axes.size == 1:
        size = dimension(source, int(axes.reshape(-1)[0]))
    if (
        size is None
        or axes is None
        or starts is None
        or finishes is None
        or (steps is not None and int(steps.reshape(-1)[0]) != 1)
    ):
        raise NotFollowedError(node, "takes a part that is not known before it runs")
    axis = int(axes.reshape(-1)[0]) % count
    if not isinstance(size, int):
        return axis, [(0, 0)]
    start, end, _ = slice(int(starts.reshape(-1)[0]), int(finishes.reshape(-1)[0])).indices(size)
    return axis, [(start, end)]


def _edit(graph: Graph, node: ir.Node, cuts: Mapping[ir.Value, tuple[int, frozenset[int]]]) -> None:
    """Change one node's constants and attributes, with the values still described as they were before."""
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    if node.op_type in ("MatMul", "Gemm"):
        transposed = node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
        rows, columns = (1, 0) if transposed else (0, 1)
        if source in cuts:
            _shrink(graph, node, 1, rows, cuts[source][1])
        if output in cuts:
            _shrink(graph, node, 1, columns, cuts[output][1])
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            if bias is not None and dimension(bias, -1) != 1:
                _shrink(graph, node, 2, len(bias.shape or ()) - 1, cuts[output][1])
    elif node.op_type in ELEMENTWISE and output in cuts:
        axis, lost = cuts[output]
        for index, value in enumerate(node.inputs):
            array = constant(value)
            place = -1 if array is None else axis - (rank(output) or 0) + array.ndim
            if array is not None and place >= 0 and array.shape[place] != 1:
                _shrink(graph, node, index, place, lost)
    elif node.op_type == "RotaryEmbedding" and output in cuts and "num_heads" in node.attributes:
        axis, lost = cuts[output]
        width, heads = dimension(output, axis), int(attribute(node, "num_heads", 0))
        if heads and isinstance(width, int):
            node.attributes["num_heads"] = ir.AttrInt64("num_heads", heads * (width - len(lost)) // width)
    elif node.op_type == "Reshape" and output in cuts:
        _edit_reshape(graph, node, *cuts[output])
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
        along, [(start, end)] = part_ranges(node)
        if along == axis:
            for place, bound in ((1, start), (2, end)):
                left = bound - len([item for item in lost if item < bound])
                node.replace_input_with(place, add_constant(graph, f"{output.name}_bound", np.array([left], np.int64)))


def _edit_reshape(graph: Graph, node: ir.Node, axis: int, lost: frozenset[int]) -> None:
    """Lower the number in a Reshape's target that stands for the axis; -1 and 0 follow by themselves."""
    target = node.inputs[1]
    array = constant(target)
    if array is not None:
        if array[axis] > 0:
            smaller = array.copy()
            smaller[axis] -= len(lost)
            node.replace_input_with(1, add_constant(graph, f"{node.outputs[0].name}_shape", smaller))
        return
    producer = None if target is None else target.producer()
    if producer is None or producer.op_type != "Concat" or len(producer.inputs) != rank(node.outputs[0]):
        raise NotFollowedError(node, "takes its shape from somewhere that cannot be followed")
    entry = constant(producer.inputs[axis])
    if entry is None or entry.size != 1 or int(entry.reshape(-1)[0]) <= 0:
        return
    inputs = list(producer.inputs)
    inputs[axis] = add_constant(graph, f"{node.outputs[0].name}_size", (entry - len(lost)).astype(entry.dtype))
    mine = ir.node("Concat", inputs, {"axis": 0})
    mine.outputs[0].name = f"{node.outputs[0].name}_shape"
    mine.outputs[0].shape, mine.outputs[0].type = target.shape, target.type  # type: ignore[union-attr]
    graph.model.graph.insert_before(node, mine)
    node.replace_input_with(1, mine.outputs[0])


def _shrink(graph: Graph, node: ir.Node, place: int, axis: int, lost: frozenset[int]) -> None:
    """Give a node a constant without some positions; it keeps its name where nothing else reads it."""
    value = node.inputs[place]
    array = constant(value)
    assert value is not None
    assert array is not None
    replace_constant(graph, node, place, np.delete(array, sorted(lost), axis=axis))


def replace_constant(graph: Graph, node: ir.Node, place: int, array: npt.NDArray[np.generic]) -> ir.Value:
    """Let one input of a node be another constant, under the old name where nothing else reads the old one."""
    value = node.inputs[place]
    assert value is not None
    name = str(value.name)
    if value.is_initializer() and len(value.uses()) == 1:
        del graph.model.graph.initializers[name]
        value.name = None
    new = add_constant(graph, name, np.ascontiguousarray(array))
    node.replace_input_with(place, new)
    return new


def _blocks(which: Sequence[int], size: int) -> frozenset[int]:
    return frozenset(block * size + index for block in which for index in range(size))
