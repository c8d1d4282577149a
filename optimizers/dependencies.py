"""What depends on a channel or head of a graph: all that has to lose the same positions, followed through every tensor.

`follow` walks from one axis of one value to every value that has to lose the same positions (a dependency group; DepGraph,
arXiv 2301.12900), until linear layers end the walk. It changes nothing; where a node cannot be followed, it says which.
Which positions to lose is not decided here, and `slicing` makes them go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxpress.optimizers.matching import attribute, constant, dimension, optional, produced_by, rank
from onnxpress.pruned import Heads

Cut = tuple[ir.Value, int, frozenset[int]]  # positions along one axis (from the front) of a value

# fmt: off
ELEMENTWISE = frozenset((
    "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", "Gelu", "Relu", "LeakyRelu", "Elu", "Erf", "Sigmoid",
    "Tanh", "Softplus", "HardSwish", "HardSigmoid", "Swish", "Mish", "Silu", "QuickGelu", "FastGelu", "BiasGelu",
    "Exp", "Log", "Sqrt", "Abs", "Neg", "Clip", "Cast", "Identity", "Dropout", "IsNaN", "Not", "And", "Or",
    "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
))
# fmt: on
FOLDED = -1  # in the place of an axis: the first of three, where each row's heads stand one after the other
_ROOT_MEAN_SQUARE = frozenset(("SimplifiedLayerNormalization", "RMSNormalization"))
NORMS = _ROOT_MEAN_SQUARE | {"LayerNormalization"}
# Inputs of the attention operators: past keys and values, those that may hold something for each head, and a mask, which may too.
_PAST = {"GroupQueryAttention": (3, 4), "Attention": (4, 5), "MultiHeadAttention": ()}
_PER_HEAD = {"GroupQueryAttention": (10, 11), "Attention": (), "MultiHeadAttention": (3, 6, 7)}
MASK = {"Attention": 3, "MultiHeadAttention": 5}
SINK = 11  # of GroupQueryAttention


class NotFollowedError(Exception):
    """A node through which a cut cannot be followed."""

    def __init__(self, node: ir.Node | None, why: str) -> None:
        where = "" if node is None else f"{node.name or node.outputs[0].name} ({node.op_type}) "
        super().__init__(f"{where}{why}")


@dataclass(kw_only=True)
class Group:
    """What goes together: positions to lose, by value; the attention operators that lose heads, with the heads that they have.

    norms: whose mean is over what is lost too, so that it is another one afterwards.
    """

    cuts: dict[ir.Value, tuple[int, frozenset[int]]] = field(default_factory=dict)
    heads: dict[ir.Node, Heads] = field(default_factory=dict)
    norms: set[ir.Node] = field(default_factory=set)


def attention_heads(node: ir.Node) -> Heads | None:
    """The heads of an attention operator whose inputs have known widths, or of a Softmax that weighs values; None for other nodes."""
    if node.op_type == "Softmax":
        return _softmax_heads(node)
    if node.op_type not in _PAST:
        return None
    inputs = list(node.inputs[:3])
    if [rank(value) for value in inputs] == [4, 4, 4]:
        counts, sizes = ([dimension(value, axis) for value in inputs] for axis in (1, 3))
        queries, groups, others = (count if isinstance(count, int) else 0 for count in counts)
        query, _, value = (size if isinstance(size, int) else 0 for size in sizes)
        if not queries or not query or not value or groups != others or not groups or queries % groups:
            return None
        return Heads(groups=groups, queries=queries // groups, size=query, value_size=value)
    names = ("q_num_heads", "kv_num_heads") if node.op_type == "Attention" else ("num_heads", "kv_num_heads")
    queries = int(attribute(node, names[0], 0))
    groups = int(attribute(node, names[1], 0)) or queries
    widths = [dimension(value, -1) if rank(value) == 3 else None for value in inputs]
    if not queries or queries % groups or not all(isinstance(width, int) for width in widths):
        return None
    query, _, value = (int(width) for width in widths if isinstance(width, int))
    return Heads(groups=groups, queries=queries // groups, size=query // queries, value_size=value // groups)


def _softmax_heads(node: ir.Node) -> Heads | None:
    """The heads of attention that is spelled out, MatMul(Softmax(MatMul(query, key)), value) on (…, heads, length, ·).

    The size of queries and keys, which nothing here depends on, is taken to be that of values.
    """
    weights = node.outputs[0]
    number = dimension(weights, -3)
    if not isinstance(number, int) or number < 2 or _softmax_axis(node, rank(weights) or 0) != (rank(weights) or 0) - 1:
        return None
    pending = [weights]
    while pending:
        for use in pending.pop().uses():
            if use.node.op_type == "MatMul" and use.idx == 0:
                size = dimension(use.node.inputs[1], -1)
                same = dimension(use.node.inputs[1], -3) == dimension(use.node.inputs[0], -3) is not None
                return (
                    Heads(groups=number, queries=1, size=size, value_size=size)
                    if isinstance(size, int) and same
                    else None
                )
            if use.node.op_type in ELEMENTWISE or _fold(use.node) is not None:
                pending.append(use.node.outputs[0])
    return None


def follow_heads(node: ir.Node, lost: Sequence[int]) -> Group:
    """Everything that depends on some key-value heads of an attention, and on the query heads that read them.

    Raises NotFollowedError.
    """
    heads = attention_heads(node)
    if heads is None:
        raise NotFollowedError(node, "has heads of unknown number or size")
    if node.op_type == "Softmax":
        weights = node.outputs[0]
        return _closure([(weights, (rank(weights) or 0) - 3, frozenset(lost))], through_norms=True)
    seeds = [(value, axis, whole_blocks(lost, block)) for value, axis, block in with_heads(node, heads)]
    return _closure(seeds, through_norms=True)


def follow(value: ir.Value, axis: int, lost: frozenset[int]) -> Group:
    """Everything that has to lose the same positions as one axis of a value. Raises NotFollowedError."""
    return _closure([(value, axis, lost)])


def _closure(seeds: Sequence[Cut], *, through_norms: bool = False) -> Group:
    """through_norms: past root mean square norms over what is lost, whose mean will be of what stays."""
    group = Group()
    pending = list(seeds)
    body = next(iter(seeds[0][0].uses())).node.graph
    while pending:
        value, axis, lost = pending.pop()
        known_axis, known = group.cuts.get(value, (axis, frozenset()))
        if known_axis != axis:
            raise NotFollowedError(value.producer(), "would lose positions of two axes")
        if lost <= known:
            continue
        group.cuts[value] = (axis, known | lost)
        if (value.is_graph_output() or value.is_graph_input()) and not _is_cache(value):
            raise NotFollowedError(value.producer(), f"{value.name} is an input or output of the graph")
        if value.is_initializer():
            raise NotFollowedError(None, f"the constant {value.name} stands where a computed value is expected")
        producer = value.producer()
        if any(use.node.graph is not body for use in value.uses()):
            raise NotFollowedError(producer, f"gives {value.name}, which a subgraph reads")
        for node in dict.fromkeys((*((producer,) if producer else ()), *(use.node for use in value.uses()))):
            if node.op_type in _PAST:
                heads = attention_heads(node)
                if heads is None:
                    raise NotFollowedError(node, "has heads of unknown number or size")
                group.heads[node] = heads
                pending.extend(_related_heads(node, heads, value, axis, lost))
            elif axis == FOLDED:
                pending.extend(_related_folded(node, value, lost))
            elif through_norms and _takes_mean_of(node, value, axis):
                group.norms.add(node)
                pending.extend((other, axis, lost) for other in (node.inputs[0], node.outputs[0]) if other is not None)
            else:
                pending.extend(_related(node, value, axis, lost))
    return group


def _takes_mean_of(node: ir.Node, value: ir.Value, axis: int) -> bool:
    """Whether a node divides by the root mean square of the last axis of a value, and multiplies by a constant."""
    if node.op_type not in _ROOT_MEAN_SQUARE or value not in (node.inputs[0], node.outputs[0]):
        return False
    last, scale = (rank(value) or 0) - 1, constant(node.inputs[1])
    return axis == last == attribute(node, "axis", -1) % (last + 1) and scale is not None and scale.ndim == 1


def _is_cache(value: ir.Value) -> bool:
    """Whether an input or output of the graph holds keys or values for an attention operator alone."""
    if value.is_graph_input():
        return all(use.idx in _PAST.get(use.node.op_type, ()) for use in value.uses())
    producer = value.producer()
    return producer is not None and producer.op_type in _PAST and value in producer.outputs[1:3]


def with_heads(node: ir.Node, heads: Heads) -> list[tuple[ir.Value, int, int]]:
    """What an attention operator reads and gives head by head: the axis, and how many positions of it a key-value head has.

    Raises NotFollowedError.
    """
    query, key, value = (*node.inputs[:3], None, None)[:3]
    if query is None or key is None or value is None:
        raise NotFollowedError(node, "reads queries, keys and values as one tensor")
    axis, sizes = (1, (1, 1)) if rank(query) == 4 else (2, (heads.size, heads.value_size))
    found = [
        (query, axis, heads.queries * sizes[0]),
        (key, axis, sizes[0]),
        (value, axis, sizes[1]),
        (node.outputs[0], axis, heads.queries * sizes[1]),
    ]
    inputs = dict(enumerate(node.inputs))
    sink = sink_of(node)
    for place in _PER_HEAD[node.op_type]:
        other = inputs.get(place)
        if other is sink or other is None or rank(other) == 2:
            continue
        if rank(other) != 4 or dimension(other, 1) != 1:
            raise NotFollowedError(node, f"has numbers of its own for each head ({other.name})")
    mask = mask_of(node)
    if mask is not None and dimension(mask, -3) == heads.groups * heads.queries:
        found.append((mask, (rank(mask) or 0) - 3, heads.queries))
    elif mask is not None and rank(mask) != 2 and not _repeats(mask, (rank(mask) or 0) - 3):
        raise NotFollowedError(node, f"has a mask of unknown shape ({mask.name})")
    caches = (*(inputs.get(place) for place in _PAST[node.op_type]), *node.outputs[1:3])
    found.extend((cache, 1, 1) for cache in caches if cache is not None and cache.name)
    return found


def sink_of(node: ir.Node) -> ir.Value | None:
    """Constant scores, one a query head, that an attention operator counts beside those of the keys."""
    sink = optional(node, SINK) if node.op_type == "GroupQueryAttention" else None
    return sink if constant(sink) is not None and dimension(sink, 0) == attribute(node, "num_heads", 0) else None


def mask_of(node: ir.Node) -> ir.Value | None:
    """What an attention operator adds to its scores, or nothing."""
    place = MASK.get(node.op_type, len(node.inputs))
    return node.inputs[place] if place < len(node.inputs) else None


def _repeats(value: ir.Value | None, axis: int) -> bool:
    """Whether all positions of an axis hold the same, as an Expand and what is computed of it do."""
    node, count = (None if value is None else value.producer()), rank(value)
    if count is not None and (axis < 0 or dimension(value, axis) == 1):
        return True
    if node is None or count is None or node.op_type not in (*ELEMENTWISE, "Expand"):
        return False
    sources = node.inputs[:1] if node.op_type == "Expand" else node.inputs
    ranks = [(source, rank(source)) for source in sources if source is not None]
    return all(number is not None and _repeats(source, axis - count + number) for source, number in ranks)


def _related_heads(node: ir.Node, heads: Heads, value: ir.Value, axis: int, lost: frozenset[int]) -> Iterator[Cut]:
    """What else of an attention operator loses positions when one of its values does."""
    there = with_heads(node, heads)
    block = next((block for other, place, block in there if other is value and place == axis), None)
    if block is None:
        raise NotFollowedError(node, "is reached by another way than its heads")
    gone = sorted({position // block for position in lost})
    if whole_blocks(gone, block) != lost:
        raise NotFollowedError(node, "would lose a part of the heads that read the same keys")
    yield from ((other, place, whole_blocks(gone, size)) for other, place, size in there)


def _related(node: ir.Node, value: ir.Value, axis: int, lost: frozenset[int]) -> Iterator[Cut]:
    """What else of a node loses positions when one of its values does; what reads the same weight where a linear layer ends the walk."""
    count, kind = rank(value), node.op_type
    if count is None:
        raise NotFollowedError(node, f"has a value of unknown rank ({value.name})")
    own = [item for item in (*node.inputs, *node.outputs) if item is not None and item.name]
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    other = output if value is source else source
    if kind == "Shape":
        return
    if weights := weight_axes(node, value, axis):
        for weight, place in weights:
            yield from _sharing(node, weight, place, lost)
    elif kind == "MatMul" and (axis < count - 2 or (axis == count - 2 and value is not node.inputs[1])):
        yield from _beside(node, value, axis, lost, own if axis < count - 2 else (source, output))
    elif kind in ("MatMul", "Gemm"):
        raise NotFollowedError(node, "multiplies two computed values, or along another axis")
    elif kind in ELEMENTWISE:
        yield from _beside(node, value, axis, lost, own)
    elif kind in NORMS and value in (source, output):
        if axis >= attribute(node, "axis", -1) % count:
            raise NotFollowedError(node, "normalizes over all channels, so that each depends on all others")
        yield other, axis, lost
    elif (kind == "Softmax" and axis < _softmax_axis(node, count)) or (
        kind == "RotaryEmbedding" and value in (source, output)
    ):
        yield other, axis, lost
    elif kind == "Transpose":
        permutation = list(attribute(node, "perm", range(count)[::-1]))
        yield (output, permutation.index(axis), lost) if value is source else (source, permutation[axis], lost)
    elif (folded := _fold(node)) is not None and value is not folded and axis == 1:
        yield folded, FOLDED, lost
    elif kind == "Tile" and value is source and axis == 0 and _tiles_first(node):
        yield output, FOLDED, lost
    elif kind in ("Reshape", "Squeeze", "Unsqueeze", "Flatten") and value in (source, output):
        yield _reshaped(node, value, axis, lost, other)
    elif kind == "Expand" and value in (source, output):
        yield from _expanded(node, value, axis, lost)
    elif kind == "Gather" and value in (source, output):
        yield from _gathered(node, value, axis, lost)
    elif (
        kind == "Concat" and attribute(node, "axis", 0) % count != axis and all(constant(item) is None for item in own)
    ):
        yield from ((item, axis, lost) for item in own if item is not value)
    elif kind in ("Split", "Slice") and value in (source, *node.outputs):
        yield from _parts(node, value, axis, lost)
    else:
        raise NotFollowedError(node, "is no operator that channels can be followed through")


def _fold(node: ir.Node) -> ir.Value | None:
    """The three axes (batch · heads, ·, ·) of a Reshape from or to four axes (batch, heads, ·, ·)."""
    source, output = node.inputs[0] if node.inputs else None, node.outputs[0]
    if node.op_type != "Reshape" or source is None or {rank(source), rank(output)} != {3, 4}:
        return None
    three, four = (source, output) if rank(source) == 3 else (output, source)
    number, first = dimension(four, 1), constant(node.inputs[1])
    concat = produced_by(node.inputs[1], "Concat")
    if first is None and concat is not None and dimension(concat.inputs[0], 0) == 1:
        first = constant(concat.inputs[0])
    inside = all(dimension(three, axis) == dimension(four, axis) is not None for axis in (-2, -1))
    known = isinstance(number, int) and not isinstance(dimension(four, 0), int)
    return three if inside and known and first is not None and first.reshape(-1)[0] == -1 else None


def _related_folded(node: ir.Node, value: ir.Value, lost: frozenset[int]) -> Iterator[Cut]:
    """What else of a node loses heads when one of its values does that has them on its first axis, each row's in turn."""
    source, output, kind = node.inputs[0], node.outputs[0], node.op_type
    assert source is not None
    other = output if value is source else source
    if _fold(node) is value:
        yield other, 1, lost
    elif kind == "Transpose" and list(attribute(node, "perm", ()))[:1] == [0]:
        yield other, FOLDED, lost
    elif kind == "Tile" and value is output and isinstance(dimension(source, 0), int) and _tiles_first(node):
        yield source, 0, lost
    elif kind == "GatherElements" and attribute(node, "axis", 0) and _repeats(node.inputs[1], 0):
        yield other, FOLDED, lost
    elif kind in ELEMENTWISE or (kind == "MatMul" and all(rank(item) == 3 for item in (*node.inputs, output))):
        for item in (*node.inputs, output):
            if item is not None and rank(item) == 3 and dimension(item, 0) != 1:
                if constant(item) is not None:
                    raise NotFollowedError(node, f"has numbers of its own for each head and row ({item.name})")
                yield item, FOLDED, lost
    else:
        raise NotFollowedError(
            node, "is no operator that heads can be followed through where they stand on the axis of rows"
        )


def _tiles_first(node: ir.Node) -> bool:
    """Whether a Tile repeats three axes along the first one alone."""
    concat = produced_by(node.inputs[1], "Concat")
    repeats = [] if concat is None else [constant(part) for part in concat.inputs[1:]]
    return len(repeats) == 2 and all(part is not None and part.tolist() == [1] for part in repeats)


def _beside(node: ir.Node, value: ir.Value, axis: int, lost: frozenset[int], own: Iterable[ir.Value]) -> Iterator[Cut]:
    """The same positions in a node's other values, whose axes are lined up from the last one and may be broadcast."""
    count = rank(value) or 0
    for other in own:
        if other is value or constant(other) is not None:
            continue
        other_rank = rank(other)
        if other_rank is None:
            raise NotFollowedError(node, f"has a value of unknown rank ({other.name})")
        place = axis - count + other_rank
        if place >= 0 and dimension(other, place) != 1:
            yield other, place, lost


def weight_axes(node: ir.Node, value: ir.Value, axis: int) -> list[tuple[ir.Value, int]]:
    """The weight of a linear layer or table, and the axis of it that an axis of the layer's input or output hangs on; else nothing."""
    count = rank(value) or 0
    output = node.outputs[0]
    if node.op_type == "Gather":
        table, indices = node.inputs[0], node.inputs[1]
        along, width = attribute(node, "axis", 0), rank(indices)
        if constant(table) is None or value is not output or along or width is None:
            return []
        place = axis - width + 1
        return [(table, place)] if table is not None and place > 0 else []
    weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
    if weight is None or value is weight or axis != count - 1 or attribute(node, "transA", 0):
        return []
    if constant(weight) is None or rank(weight) != 2:
        return []
    rows = int(node.op_type == "Gemm" and bool(attribute(node, "transB", 0)))
    return [(weight, place) for item, place in ((node.inputs[0], rows), (output, 1 - rows)) if item is value]


def _sharing(node: ir.Node, weight: ir.Value, axis: int, lost: frozenset[int]) -> Iterator[Cut]:
    """What other nodes read or give along an axis of a weight that they share. Raises NotFollowedError."""
    for use in weight.uses():
        values = [item for item in (*use.node.inputs[:1], use.node.outputs[0]) if item is not None]
        found = [
            (item, place)
            for item in values
            for place in range(rank(item) or 0)
            if (weight, axis) in weight_axes(use.node, item, place)
        ]
        if use.node.graph is not node.graph or not found:
            raise NotFollowedError(node, f"shares its weight {weight.name} with {use.node.name} ({use.node.op_type})")
        yield from ((item, place, lost) for item, place in found)


def _expanded(node: ir.Node, value: ir.Value, axis: int, lost: frozenset[int]) -> Iterator[Cut]:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    ranks = rank(source), rank(output)
    if ranks[0] is None or ranks[1] is None:
        raise NotFollowedError(node, "has an unknown shape")
    place = axis if value is output else axis + ranks[1] - ranks[0]
    inside = place - ranks[1] + ranks[0]
    if inside >= 0 and dimension(source, inside) != 1:
        yield source, inside, lost
    if not isinstance(dimension(output, place), int):
        raise NotFollowedError(node, "has an unknown shape")
    yield output, place, lost


def _gathered(node: ir.Node, value: ir.Value, axis: int, lost: frozenset[int]) -> Iterator[Cut]:
    """Past a Gather along another axis (a part of a tensor, as an index of Python's takes it)."""
    source, output = node.inputs[0], node.outputs[0]
    counts = rank(source), rank(node.inputs[1])
    if source is None or counts[0] is None or counts[1] is None or constant(source) is not None:
        raise NotFollowedError(node, "is no operator that channels can be followed through")
    along = attribute(node, "axis", 0) % counts[0]
    more = counts[1] - 1  # axes that the indices add
    if value is source and axis != along:
        yield output, axis if axis < along else axis + more, lost
    elif value is output and not along <= axis <= along + more:
        yield source, axis if axis < along else axis - more, lost
    else:
        raise NotFollowedError(node, "picks channels")


def _reshaped(node: ir.Node, value: ir.Value, axis: int, lost: frozenset[int], other: ir.Value) -> Cut:
    """The same positions on the other side of a Reshape, where they are all positions of one axis there.

    From the last axis on, runs of axes that hold as many elements on both sides hold the same ones.
    """
    count, other_count = rank(value), rank(other)
    if count is None or other_count is None:
        raise NotFollowedError(node, "has an unknown shape")
    mine = [dimension(value, place) for place in range(count)]
    theirs = [dimension(other, place) for place in range(other_count)]
    end, other_end = count, other_count
    while end > axis and other_end > 0:
        begin, other_begin = end - 1, other_end - 1
        one, another = mine[begin], theirs[other_begin]
        while one != another and isinstance(one, int) and isinstance(another, int):
            smaller = one < another
            more = mine[begin - 1 : begin] if smaller else theirs[other_begin - 1 : other_begin]
            if not more or not isinstance(more[0], int):
                break
            if smaller:
                begin, one = begin - 1, one * more[0]
            else:
                other_begin, another = other_begin - 1, another * more[0]
        if one != another or one is None:
            if mine[end - 1] == 1 and end - 1 != axis:
                end -= 1
                continue
            if theirs[other_end - 1] == 1:
                other_end -= 1
                continue
            break
        if begin <= axis:
            inside = [size for size in mine[begin:end] if isinstance(size, int)]
            outside = [size for size in theirs[other_begin:other_end] if isinstance(size, int)]
            found = _positions(inside, axis - begin, lost, outside) if inside else None
            if found is None:
                break
            return other, other_begin + found[0], found[1]
        end, other_end = begin, other_begin
    raise NotFollowedError(node, "mixes the channels with something else")


def _positions(
    sizes: Sequence[int], axis: int, lost: frozenset[int], other_sizes: Sequence[int]
) -> tuple[int, frozenset[int]] | None:
    """Where positions of an axis are when the elements of an array stand in another shape; None where no single axis has them."""
    gone = np.zeros(sizes, bool)
    gone[(slice(None),) * axis + (sorted(lost),)] = True
    gone = gone.reshape(other_sizes)
    for place, size in enumerate(other_sizes):
        along = gone.any(axis=tuple(item for item in range(gone.ndim) if item != place))
        shape = [size if item == place else 1 for item in range(gone.ndim)]
        if not along.all() and (gone == along.reshape(shape)).all():
            return place, frozenset(np.flatnonzero(along).tolist())
    return None


def _parts(node: ir.Node, value: ir.Value, axis: int, lost: frozenset[int]) -> Iterator[Cut]:
    source = node.inputs[0]
    assert source is not None
    if node.op_type == "Slice" and len(node.inputs) > 3:
        axes, count = constant(node.inputs[3]), rank(source) or 0
        if axes is not None and axis not in [int(item) % count for item in axes.reshape(-1)]:
            yield (node.outputs[0] if value is source else source), axis, lost
            return
    along, ranges = part_ranges(node)
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


def _softmax_axis(node: ir.Node, count: int) -> int:
    """From which axis on a Softmax is taken: the last, or before opset 13 all that follow."""
    body = node.graph
    old = isinstance(body, ir.Graph) and body.opset_imports.get("", 1) < 13
    return int(attribute(node, "axis", 1 if old else -1)) % count


def whole_blocks(which: Iterable[int], size: int) -> frozenset[int]:
    """Of the given blocks of so many positions each, all positions."""
    return frozenset(block * size + index for block in which for index in range(size))
