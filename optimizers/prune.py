"""Structured pruning: fewer attention heads, feed-forward channels and layers; shapes really get smaller.

    down @ gelu(up @ x), 1536 channels   →   the 768 channels whose loss can be made up for best, `down` fitted anew

What is lost is chosen by what calibration inputs bring: for each layer in turn, behind layers that are pruned already, the second
moments of what the last projection reads say how much each channel or head matters beside all others, and how the weights of those
that stay make up for those that go (Optimal Brain Surgeon for groups of weights; arXiv 2203.07259, 2302.04089). All layers lose
the same share: kernels and devices like equal shapes. Layers to lose are those that change their input least (arXiv 2403.03853);
where training follows, those ahead of the last: the layers before them keep what they read (arXiv 2403.17887).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.manifest import Arrays, Signature, TensorSpec
from onnxpress.optimizers.base import Stream
from onnxpress.optimizers.layers import drop_layers, find_layers
from onnxpress.optimizers.linear import Linear, drop_unused_constants, linears
from onnxpress.optimizers.matching import dimension, rank
from onnxpress.optimizers.rounding import Float
from onnxpress.optimizers.slicing import (
    Group,
    NotFollowedError,
    attention_heads,
    cut,
    follow,
    follow_heads,
    replace_constant,
)
from onnxpress.pruned import Change, Heads, LostHeads, Pruned

Wide = npt.NDArray[np.float64]

_DAMPING = 0.01  # of the mean energy, added to every channel's: keeps inverses finite
_ROUNDS = 8  # channels go in so many portions, between which the others' importance is found anew


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """How much goes: below 1 a share, from 1 on a number; of the layers, and in each layer of heads and feed-forward channels.

    heads: of the key-value heads, each with the query heads that read it. multiple: the number of channels that stay is one of
    these, where that leaves a layer more than this many.
    """

    ffn: float = 0.0
    heads: float = 0.0
    layers: float = 0.0
    multiple: int = 32

    def __post_init__(self) -> None:
        for name in ("ffn", "heads", "layers"):
            value = getattr(self, name)
            if not value >= 0 or (value > 1 and value != int(value)):
                raise RecipeError(f"prune: {name} is {value!r}; it takes a share from 0 to 1, or a whole number.")
        if self.multiple < 1:
            raise RecipeError(f"prune: multiple is {self.multiple!r}; it takes a whole number from 1 on.")
        if not self.ffn and not self.heads and not self.layers:
            raise RecipeError("prune: nothing is to go; set ffn, heads or layers.")


@dataclass(frozen=True, kw_only=True)
class _Place:
    """One feed-forward block or attention: what is followed, where it ends, and how many units of how many channels it has."""

    kind: str
    last: Linear  # reads the channels
    units: int
    size: int
    group: Callable[[Sequence[int]], Group]
    heads: Heads | None = None


def prune(
    graph: Graph,
    options: PruneOptions,
    *,
    stream: Callable[[Graph], Stream],
    activations: Callable[[Graph, Sequence[str]], Iterator[Arrays]],
    training_follows: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Pruned:
    """Prune a graph, which is changed in place. Layers go first, then heads and channels in the order of the graph.

    training_follows: what goes may then be what is learned again best, and not what is missed least. stream: begins to walk a graph with calibration inputs; activations: values by name for one input after another.
    Raises RecipeError where more is to go than there is, or nothing of what is to go can be found.
    """
    before = {name: value.const_value for name, value in graph.model.graph.initializers.items()}
    notes: list[str] = []
    dropped: tuple[frozenset[str], ...] = ()
    layers = find_layers(graph)
    kept = tuple(range(len(layers)))
    if options.layers:
        if not layers:
            raise RecipeError(
                "prune: layers were to go, but the graph's layers cannot be told apart (attention has to be fused)."
            )
        number = _number(options.layers, len(layers), "layers")
        if not number:
            raise RecipeError(
                f"prune: so small a share of {len(layers)} layers is none at all; give a larger one, or a number."
            )
        if training_follows:
            lost = list(range(len(layers) - 1 - number, len(layers) - 1))
        else:
            progress("how much each layer changes")
            lost = _least_changing(graph, number, activations)
        dropped = tuple(layers[index].constants() for index in lost)
        kept = tuple(index for index in kept if index not in lost)
        drop_layers(graph, [layers[index] for index in lost])
        notes.append(f"gone of the {len(layers)} layers: {', '.join(f'number {index + 1}' for index in lost)}")
    places, left = _places(graph, options)
    notes.extend(left)
    if not places and not dropped:
        raise RecipeError(f"prune: nothing can go. {'; '.join(left) or _why_nowhere(graph)}")
    shares: dict[str, list[float]] = {}
    walk = stream(graph)
    decided: list[tuple[_Place, list[int]]] = []
    for index, place in enumerate(places):
        progress(f"{place.kind} {index + 1} of {len(places)}")
        number = _number(getattr(options, place.kind), place.units, place.kind)
        if place.kind == "ffn":
            number = _to_a_multiple(number, place.units, options.multiple)
        if not number:
            continue
        weight = place.last.weight_array().astype(np.float64)
        moments = walk.second_moments(place.last.x)
        gone, fitted, error = without(weight, moments, size=place.size, number=number)
        shares.setdefault(place.kind, []).append(error)
        # The shapes stay until the walk is over: rows of zeros are as good as none.
        node, position = place.last.nodes[0], 1
        array = fitted.T if place.last.transposed else fitted
        replace_constant(graph, node, position, array.astype(np.float32))
        decided.append((place, gone))
    if not decided and not dropped:
        there = ", ".join(dict.fromkeys(f"{place.units} {place.kind}" for place in places))
        raise RecipeError(f"prune: so small a share of {there} is none at all; give a larger one, or a number.")
    lost_heads: list[LostHeads] = []
    for place, gone in decided:
        group = place.group(gone)
        cut(graph, group)
        if place.heads is not None:
            names = frozenset(_constants(group))
            lost_heads.append(LostHeads(constants=names, before=place.heads, groups=place.units - len(gone)))
    graph.signature = _signature(graph)
    drop_unused_constants(graph)
    notes.extend(f"{kind}: nothing went" for kind in ("heads", "ffn") if getattr(options, kind) and kind not in shares)
    notes.extend(
        f"{kind}: {len(errors)} places, {100 * max(errors):.1f} % of a layer's energy lost at most"
        for kind, errors in shares.items()
    )
    changes = _changes(graph, before)
    return Pruned(
        graph=graph,
        changes=changes,
        heads=tuple(lost_heads),
        layers=dropped,
        kept_layers=kept,
        notes=tuple(notes),
    )


def without(weight: Wide, moments: Float, *, size: int, number: int) -> tuple[list[int], Wide, float]:
    """Which units a linear layer can best do without, its weight fitted to that, and the share of its answers' energy lost.

    weight: (in, out); moments: (in, in), the inputs' mean x xᵀ; a unit is `size` neighbouring inputs; `number` of them go. The rows
    of those are zeros in the weight that comes back.
    """
    units = len(weight) // size
    damped = moments.astype(np.float64)
    damped.flat[:: len(weight) + 1] += _DAMPING * float(np.trace(moments)) / len(weight) or 1.0
    inverse = np.linalg.inv(damped)
    fitted = weight.copy()
    stay = list(range(units))
    gone: list[int] = []
    portion = -(-number // _ROUNDS)
    while len(gone) < number:
        inside = [np.arange(unit * size, (unit + 1) * size) for unit in stay]
        scores = [
            float(np.einsum("io,io->", fitted[rows], np.linalg.solve(inverse[np.ix_(rows, rows)], fitted[rows])))
            for rows in inside
        ] if size > 1 else list((fitted[stay] ** 2).sum(axis=1) / inverse[stay, stay])  # fmt: skip
        chosen = sorted(np.argsort(scores, kind="stable")[: min(portion, number - len(gone))].tolist(), reverse=True)
        rows = np.concatenate([inside[index] for index in chosen])
        within = np.linalg.inv(inverse[np.ix_(rows, rows)])
        fitted -= inverse[:, rows] @ (within @ fitted[rows])
        inverse -= inverse[:, rows] @ (within @ inverse[rows])
        gone.extend(stay.pop(index) for index in chosen)
    fitted[np.concatenate([np.arange(unit * size, (unit + 1) * size) for unit in gone])] = 0.0
    difference = fitted - weight
    whole = float(np.einsum("io,io->", weight, moments @ weight))
    error = float(np.einsum("io,io->", difference, moments @ difference)) / whole if whole else 0.0
    return sorted(gone), fitted, error


def _places(graph: Graph, options: PruneOptions) -> tuple[list[_Place], list[str]]:
    """Where something can go, in the order of the graph, and sentences about what stays whole."""
    found: list[_Place] = []
    left: list[str] = []
    layers = list(linears(graph))
    first = {layer.nodes[0]: layer for layer in layers}
    hidden = Counter(dimension(layer.x, -1) for layer in layers).most_common(1)[0][0] if layers else None
    if options.heads:
        for node in graph.model.graph:
            heads = attention_heads(node)
            if heads is None:
                continue
            try:
                last = _reader(follow_heads(node, [0]), first)
            except NotFollowedError as error:
                left.append(f"heads stay whole: {error}")
                continue
            found.append(_heads_place(node, heads, last))
    if options.ffn:
        for layer in layers:
            units, axis = dimension(layer.x, -1), (rank(layer.x) or 1) - 1
            try:
                group = follow(layer.x, axis, frozenset((0,)))
                if not _returns(group, layer):
                    continue
                last = _reader(group, first)
            except NotFollowedError as error:
                if units != hidden:
                    left.append(f"channels of {layer.name} stay whole: {error}")
                continue
            assert isinstance(units, int)
            found.append(_channels_place(last, units, axis))
    if options.heads and not any(place.kind == "heads" for place in found) and not left:
        left.append("there is no fused attention whose heads could go")
    order = {node: index for index, node in enumerate(graph.model.graph)}
    return sorted(found, key=lambda place: order[place.last.nodes[0]]), left


def _why_nowhere(graph: Graph) -> str:
    weights = [node.inputs[1] for node in graph.model.graph if node.op_type in ("MatMul", "Gemm")]
    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if any(weight is not None and weight.is_initializer() and weight.dtype in halves for weight in weights):
        return (
            "The weights are in half precision: prune the float32 model, and convert what comes out (--precision fp16)."
        )
    return "The graph has no such place."


def _heads_place(node: ir.Node, heads: Heads, last: Linear) -> _Place:
    return _Place(
        kind="heads",
        last=last,
        units=heads.groups,
        size=heads.queries * heads.value_size,
        group=lambda lost: follow_heads(node, lost),
        heads=heads,
    )


def _channels_place(last: Linear, units: int, axis: int) -> _Place:
    return _Place(kind="ffn", last=last, units=units, size=1, group=lambda lost: follow(last.x, axis, frozenset(lost)))


def _reader(group: Group, first: Mapping[ir.Node, Linear]) -> Linear:
    """The one linear layer that reads a group's channels. Raises NotFollowedError."""
    readers = [
        first[use.node]
        for value in group.cuts
        for use in value.uses()
        if use.node in first and first[use.node].x is value
    ]
    if len(readers) != 1:
        raise NotFollowedError(None, f"{len(readers)} linear layers read the same channels")
    return readers[0]


def _returns(group: Group, last: Linear) -> bool:
    """Whether the layers that give a group's channels read as wide a value as the last one gives."""
    wide = dimension(last.output, -1)
    givers = [value.producer() for value in group.cuts]
    sources = [node.inputs[0] for node in givers if node is not None and node.op_type in ("MatMul", "Gemm")]
    return bool(sources) and all(dimension(source, -1) == wide for source in sources)


def _number(wanted: float, there: int, kind: str) -> int:
    """How many of what is there go. Raises RecipeError where none would be left."""
    number = round(wanted * there) if wanted < 1 else int(wanted)
    if number >= there:
        raise RecipeError(f"prune: {kind} is {wanted:g}, but there are {there}; at least one has to stay.")
    return number


def _to_a_multiple(number: int, there: int, multiple: int) -> int:
    """How many go so that a multiple stays: the nearest one, but fewer than there are."""
    if not number or there - number <= multiple:
        return number
    return there - min(round((there - number) / multiple), (there - 1) // multiple) * multiple


def _least_changing(
    graph: Graph, number: int, activations: Callable[[Graph, Sequence[str]], Iterator[Arrays]]
) -> list[int]:
    """The layers whose answers are most like their inputs, by the mean cosine of all tokens."""
    layers = find_layers(graph)
    ends = [(str(layer.before.name), str(layer.after.name)) for layer in layers]
    likeness = np.zeros(len(layers))
    for values in activations(graph, sorted({name for pair in ends for name in pair})):
        for index, (before, after) in enumerate(ends):
            one, other = values[before].astype(np.float64), values[after].astype(np.float64)
            norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
            likeness[index] += float(((one * other).sum(axis=-1) / np.maximum(norms, 1e-30)).mean())
    return sorted(np.argsort(-likeness, kind="stable")[:number].tolist())


def _constants(group: Group) -> Iterator[str]:
    """Names of the weights that the linear layers at a group's ends read."""
    for value in group.cuts:
        for node in (value.producer(), *(use.node for use in value.uses())):
            if node is not None and node.op_type in ("MatMul", "Gemm"):
                yield from (str(item.name) for item in node.inputs[1:] if item is not None and item.is_initializer())


def _signature(graph: Graph) -> Signature:
    """With the shapes that inputs and outputs have now: caches of fewer heads."""
    shapes = {
        value.name: tuple(dimension(value, axis) for axis in range(rank(value) or 0))
        for value in (*graph.model.graph.inputs, *graph.model.graph.outputs)
    }

    def now(spec: TensorSpec) -> TensorSpec:
        pairs = zip(spec.shape, shapes.get(spec.name, spec.shape), strict=False)
        return dataclasses.replace(spec, shape=tuple(new if isinstance(new, int) else old for old, new in pairs))

    inputs, outputs = map(now, graph.signature.inputs), map(now, graph.signature.outputs)
    return dataclasses.replace(graph.signature, inputs=tuple(inputs), outputs=tuple(outputs))


def _changes(graph: Graph, before: Mapping[str, ir.TensorProtocol | None]) -> dict[str, Change]:
    changes = {}
    for name, value in graph.model.graph.initializers.items():
        old, new = before.get(name), value.const_value
        if old is not None and new is not None and new is not old:
            changes[name] = Change(before=old.numpy(), after=new.numpy())
    return changes
