"""Structured pruning: fewer attention heads, feed-forward channels and layers; shapes really get smaller.

    down @ gelu(up @ x), 1536 channels   →   the 768 channels whose loss can be made up for best, `down` fitted anew

What is lost is chosen by what calibration inputs bring: for each layer in turn, behind layers that are pruned already, the second
moments of what the last projection reads say how much each channel or head matters beside all others, and how the weights of those
that stay make up for those that go (Optimal Brain Surgeon for groups of weights; arXiv 2203.07259, 2302.04089). All layers lose
the same share: kernels and devices like equal shapes. Layers to lose are those that change their input least (arXiv 2403.03853);
where training follows, the layers just before the last go instead, so that all earlier ones still read what they were
trained on (arXiv 2403.17887).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.manifest import Arrays, Signature, TensorSpec
from onnxpress.optimizers.base import Stream
from onnxpress.optimizers.dependencies import Group, NotFollowedError, attention_heads, follow, follow_heads
from onnxpress.optimizers.edits import drop_unused_constants, replace_constant, replace_everywhere
from onnxpress.optimizers.error_feedback import inverse
from onnxpress.optimizers.experts import mixtures
from onnxpress.optimizers.heads import swap_last_axes
from onnxpress.optimizers.layers import drop_layers, find_layers
from onnxpress.optimizers.linear import Linear, linears
from onnxpress.optimizers.matching import constant, dimension, rank
from onnxpress.optimizers.rounding import Float
from onnxpress.optimizers.slicing import cut
from onnxpress.pruned import Change, Heads, LostHeads, Pruned

Wide = npt.NDArray[np.float64]

_ROUNDS = 8  # channels go in so many portions, between which the others' importance is found anew


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """How much goes, a share below 1 or a whole number; of the layers, and in each layer of heads and feed-forward channels.

    heads: of the key-value heads, each with the query heads that read it. multiple: the number of channels that stay is one of
    these, where that leaves a layer more than this many.
    """

    ffn: int | float = 0
    heads: int | float = 0
    layers: int | float = 0
    multiple: int = 32

    def __post_init__(self) -> None:
        for name in ("ffn", "heads", "layers"):
            value = getattr(self, name)
            number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not number and not (isinstance(value, float) and 0 <= value < 1):
                raise RecipeError(
                    f"prune: {name} is {value!r}; it takes a share below 1, e.g. 0.5, or a whole number written without a point, e.g. 1."
                )
        if self.multiple < 1:
            raise RecipeError(f"prune: multiple is {self.multiple!r}; it takes a whole number from 1 on.")
        if not self.ffn and not self.heads and not self.layers:
            raise RecipeError("prune: nothing is to go; set ffn, heads or layers.")

    def check_sizes(self, **sizes: int) -> None:
        """Raise RecipeError where as many of ffn, heads or layers are to go as there are by a model's config, or a share that is none."""
        for kind, there in sizes.items():
            if getattr(self, kind) and not _number(getattr(self, kind), there, kind):
                raise RecipeError(
                    f"prune: so small a share of {there} {kind} is none at all; give a larger one, or a number."
                )


@dataclass(frozen=True, kw_only=True)
class _Place:
    """One feed-forward block or attention, or several that share weights: what is followed, and how many units of channels it has.

    last: what reads the channels, in the order of the graph. size: the channels of one unit, which are neighbours in what is read.
    """

    kind: str
    last: tuple[Linear, ...]
    units: int
    size: int
    group: Callable[[Sequence[int]], Group]
    nodes: frozenset[ir.Node]  # what belongs to it
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
    swap_last_axes(graph)
    before = {name: value.const_value for name, value in graph.model.graph.initializers.items()}
    gone = _drop_layers(graph, options, activations, training_follows=training_follows, progress=progress)
    places, left = _places(graph, options)
    notes = [*gone.notes, *left]
    if not places and not gone.constants:
        raise RecipeError(f"prune: nothing can go. {'; '.join(left) or _why_nowhere(graph)}")
    decided, shares = _narrow(graph, places, options, stream, progress)
    if not decided and not gone.constants:
        there = ", ".join(dict.fromkeys(f"{place.units} {place.kind}" for place in places))
        raise RecipeError(f"prune: so small a share of {there} is none at all; give a larger one, or a number.")
    notes.extend(_fit_norms(graph, [place.group(units) for place, units in decided], activations))
    heads, kept = [], dict[str, dict[int, npt.NDArray[np.int64]]]()
    for place, units in decided:
        group = place.group(units)
        for name, axes in cut(graph, group).items():
            smaller = constant(graph.model.graph.initializers[name])
            assert smaller is not None
            for axis, lost in axes.items():  # a packed weight may lose channels of several places
                whole = np.arange(smaller.shape[axis] + len(lost))
                kept.setdefault(name, {})[axis] = np.delete(kept.get(name, {}).get(axis, whole), sorted(lost))
        if place.heads is not None:
            names = frozenset(_constants(group))
            heads.append(LostHeads(constants=names, before=place.heads, groups=place.units - len(units)))
    graph.signature = _signature(graph)
    drop_unused_constants(graph)
    notes.extend(f"{kind}: nothing went" for kind in ("heads", "ffn") if getattr(options, kind) and kind not in shares)
    rounded = f", a multiple of {options.multiple} channels stays" if options.multiple > 1 else ""
    notes.extend(
        f"{kind}: {len(errors)} places{rounded if kind == 'ffn' else ''}, {100 * max(errors):.1f} % of a layer's energy lost at most"
        for kind, errors in shares.items()
    )
    return Pruned(
        graph=graph,
        changes=_changes(graph, before, kept),
        heads=tuple(heads),
        layers=gone.constants,
        kept_layers=gone.kept,
        notes=tuple(notes),
    )


class _GoneLayers(NamedTuple):
    """constants: the weights of each layer that went; kept: which stayed, by their places."""

    constants: tuple[frozenset[str], ...]
    kept: tuple[int, ...]
    notes: tuple[str, ...]


def _drop_layers(
    graph: Graph,
    options: PruneOptions,
    activations: Callable[[Graph, Sequence[str]], Iterator[Arrays]],
    *,
    training_follows: bool,
    progress: Callable[[str], None],
) -> _GoneLayers:
    """Take whole layers out of the graph: the last but one and those before it where training follows, else those that change least."""
    layers = find_layers(graph)
    if not options.layers:
        return _GoneLayers((), tuple(range(len(layers))), ())
    if not layers:
        raise RecipeError(
            "prune: layers were to go, but the graph's layers cannot be told apart (each has to have attention whose heads can be told apart)."
        )
    options.check_sizes(layers=len(layers))
    number = _number(options.layers, len(layers), "layers")
    if training_follows:
        lost = list(range(len(layers) - 1 - number, len(layers) - 1))
    else:
        progress("how much each layer changes")
        lost = _least_changing(graph, number, activations)
    constants = tuple(layers[index].constants() for index in lost)  # while they are in the graph
    drop_layers(graph, [layers[index] for index in lost])
    return _GoneLayers(
        constants=constants,
        kept=tuple(index for index in range(len(layers)) if index not in lost),
        notes=(f"gone of the {len(layers)} layers: {', '.join(f'number {index + 1}' for index in lost)}",),
    )


def _narrow(
    graph: Graph,
    places: Sequence[_Place],
    options: PruneOptions,
    stream: Callable[[Graph], Stream],
    progress: Callable[[str], None],
) -> tuple[list[tuple[_Place, list[int]]], dict[str, list[float]]]:
    """Choose the units that go at each place, and fit the weights behind it to that; the units by place, the errors by kind.

    The shapes stay until the walk is over: rows of zeros are as good as none.
    """
    decided: list[tuple[_Place, list[int]]] = []
    shares: dict[str, list[float]] = {}
    walk = stream(graph)
    for index, place in enumerate(places):
        progress(f"{place.kind} {index + 1} of {len(places)}")
        number = _number(getattr(options, place.kind), place.units, place.kind)
        if place.kind == "ffn":
            number = _to_a_multiple(number, place.units, options.multiple)
        if not number:
            continue
        moments = {layer.x: walk.second_moments(layer.x) for layer in place.last}
        weights = {layer.weight: layer for layer in place.last}
        parts = [
            (
                layer.weight_array().astype(np.float64),
                _mean([moments[item.x] for item in place.last if item.weight is weight]),
            )
            for weight, layer in weights.items()
        ]
        gone, fitted, error = without(parts, size=place.size, number=number)
        shares.setdefault(place.kind, []).append(error)
        for array, (weight, layer) in zip(fitted, weights.items(), strict=True):
            replace_everywhere(graph, weight, (array.T if layer.transposed else array).astype(np.float32))
        if len(moments) > 1:
            walk = stream(graph)  # it stands behind layers that are others now
        decided.append((place, gone))
    return decided, shares


def without(parts: Sequence[tuple[Wide, Float]], *, size: int, number: int) -> tuple[list[int], list[Wide], float]:
    """Which units linear layers can best do without, their weights fitted to that, and the share of their answers' energy lost.

    parts: for each layer its weight (in, out) and the moments (in, in), its inputs' mean x xᵀ; a unit is `size` neighbouring inputs,
    `number` of them go, the same of all layers. The rows of those are zeros in the weights that come back. Several layers count by
    the share of their own energy; the largest of those is given.
    """
    units = len(parts[0][0]) // size
    fits = [_Fit(weight, moments) for weight, moments in parts]
    stay = list(range(units))
    gone: list[int] = []
    portion = -(-number // _ROUNDS)
    while len(gone) < number:
        inside = [np.arange(unit * size, (unit + 1) * size) for unit in stay]
        scores = np.sum([fit.scores(inside) for fit in fits], axis=0)
        chosen = sorted(np.argsort(scores, kind="stable")[: min(portion, number - len(gone))].tolist(), reverse=True)
        for fit in fits:
            fit.leave_out(np.concatenate([inside[index] for index in chosen]))
        gone.extend(stay.pop(index) for index in chosen)
    rows = np.concatenate([np.arange(unit * size, (unit + 1) * size) for unit in gone])
    for fit in fits:
        fit.fitted[rows] = 0.0
    return sorted(gone), [fit.fitted for fit in fits], max(fit.error() for fit in fits)


class _Fit:
    """One linear layer's weight while inputs are left out of it (Optimal Brain Surgeon). weight: (in, out); moments: (in, in)."""

    def __init__(self, weight: Wide, moments: Float) -> None:
        self._weight, self._moments = weight, moments
        self._inverse: Wide = inverse(moments)
        self._energy = float(np.einsum("io,io->", weight, moments @ weight))
        self.fitted = weight.copy()

    def scores(self, inside: Sequence[npt.NDArray[np.int64]]) -> Wide:
        """What leaving out each set of inputs costs when all others make up for it, of the layer's energy."""
        seen = self._moments.diagonal() > 0  # what is always 0 is not missed
        fitted, inverted = self.fitted * seen[:, None], self._inverse
        if len(inside[0]) == 1:
            stay = np.concatenate(inside)
            costs = (fitted[stay] ** 2).sum(axis=1) / inverted[stay, stay]
        else:
            costs = np.array([
                np.einsum("io,io->", fitted[rows], np.linalg.solve(inverted[np.ix_(rows, rows)], fitted[rows]))
                for rows in inside
            ])  # fmt: skip
        return np.asarray(costs / (self._energy or 1.0))

    def leave_out(self, rows: npt.NDArray[np.int64]) -> None:
        """Let the other inputs make up for these."""
        inverted = self._inverse
        within = np.linalg.inv(inverted[np.ix_(rows, rows)])
        self.fitted -= inverted[:, rows] @ (within @ self.fitted[rows])
        self._inverse = inverted - inverted[:, rows] @ (within @ inverted[rows])

    def error(self) -> float:
        """The share of the answers' energy that is lost."""
        difference = self.fitted - self._weight
        return (
            float(np.einsum("io,io->", difference, self._moments @ difference)) / self._energy if self._energy else 0.0
        )


def _fit_norms(
    graph: Graph, groups: Sequence[Group], activations: Callable[[Graph, Sequence[str]], Iterator[Arrays]]
) -> Iterator[str]:
    """Scale norms over all heads by what the root mean square of the heads that stay is of that of all, as a mean over all tokens."""
    lost = {node.inputs[0]: (node, group.cuts[node.outputs[0]][1]) for group in groups for node in group.norms}
    if not lost:
        return
    ratios: dict[ir.Value, list[Wide]] = {value: [] for value in lost if value is not None}
    for values in activations(graph, sorted(str(value.name) for value in ratios)):
        for value, found in ratios.items():
            squares = np.square(values[str(value.name)].astype(np.float64))
            stay = np.delete(squares, sorted(lost[value][1]), axis=-1)
            found.append(np.sqrt(stay.mean(axis=-1) / np.maximum(squares.mean(axis=-1), 1e-30)).reshape(-1))
    for value, found in ratios.items():
        node, _ = lost[value]
        scale = constant(node.inputs[1])
        assert scale is not None
        replace_constant(graph, node, 1, (scale * np.concatenate(found).mean()).astype(scale.dtype))
    yield f"heads: {len(lost)} norms over all heads take their mean over those that stay, and are scaled to give as much as before"


def _mean(moments: Sequence[Float]) -> Float:
    return moments[0] if len(moments) == 1 else np.mean(moments, axis=0)


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
            if heads is None or any(node in place.nodes for place in found):
                continue
            if heads.groups == 1:
                left.append(f"heads stay whole: {node.name or node.op_type} has a single key-value head")
                continue
            try:
                group = follow_heads(node, [0])
                found.append(_place("heads", group, first, heads.groups, partial(follow_heads, node), heads))
            except NotFollowedError as error:
                left.append(f"heads stay whole: {error}")
    if options.ffn:
        for layer in layers:
            units, axis = dimension(layer.x, -1), (rank(layer.x) or 1) - 1
            if any(layer.nodes[0] in place.nodes for place in found if place.kind == "ffn"):
                continue
            try:
                group = follow(layer.x, axis, frozenset((0,)))
                if not _returns(group, layer):
                    continue
                assert isinstance(units, int)
                found.append(_place("ffn", group, first, units, partial(_follow_channels, layer.x, axis)))
            except NotFollowedError as error:
                if units != hidden:
                    left.append(f"channels of {layer.name} stay whole: {error}")
        picked = [
            node for node in graph.model.graph if node.op_type in ("Gather", "GatherND") and _is_stack(node.inputs[0])
        ]
        mixed = sum(len([value for value in node.inputs if _is_stack(value)]) for node in mixtures(graph))
        if picked or mixed:
            stacks = len(picked) + mixed
            left.append(f"channels of experts stay whole: each token picks its own of {stacks} stacks of weights")
    named = any(place.kind == "heads" for place in found) or any(note.startswith("heads") for note in left)
    if options.heads and not named:
        left.append("heads stay whole: there is no attention whose heads could be told apart")
    order = {node: index for index, node in enumerate(graph.model.graph)}
    return sorted(found, key=lambda place: order[place.last[0].nodes[0]]), left


def _is_stack(value: ir.Value | None) -> bool:
    """Whether a value is a constant of several matrices."""
    return value is not None and value.is_initializer() and rank(value) == 3 and value.dtype == ir.DataType.FLOAT


def _why_nowhere(graph: Graph) -> str:
    weights = [node.inputs[1] for node in graph.model.graph if node.op_type in ("MatMul", "Gemm")]
    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if any(weight is not None and weight.is_initializer() and weight.dtype in halves for weight in weights):
        return (
            "The weights are in half precision: prune the float32 model, and convert what comes out (--precision fp16)."
        )
    return "The graph has no such place."


def _follow_channels(value: ir.Value, axis: int, lost: Sequence[int]) -> Group:
    return follow(value, axis, frozenset(lost))


def _place(
    kind: str,
    group: Group,
    first: Mapping[ir.Node, Linear],
    units: int,
    follow_units: Callable[[Sequence[int]], Group],
    heads: Heads | None = None,
) -> _Place:
    """A place, from the group of its first unit. Raises NotFollowedError."""
    readers = {
        use.node: first[use.node]
        for value in group.cuts
        for use in value.uses()
        if use.node in first and first[use.node].x is value
    }
    if not readers:
        raise NotFollowedError(None, "no linear layer reads the channels")
    for node, layer in readers.items():
        if any(use.node not in readers for use in layer.weight.uses()):
            raise NotFollowedError(
                node, f"shares its weight {layer.weight.name} with what does not read the same channels"
            )
    order = {node: index for index, node in enumerate(next(iter(readers)).graph or ())}
    last = tuple(readers[node] for node in sorted(readers, key=order.__getitem__))
    blocks = {(dimension(layer.x, -1), group.cuts[layer.x]) for layer in last}
    width, (axis, positions) = blocks.pop()
    size = len(positions)
    if blocks or width != units * size or positions != frozenset(range(size)) or axis != (rank(last[0].x) or 0) - 1:
        raise NotFollowedError(last[0].nodes[0], "reads the channels in another order")
    nodes = frozenset(
        (*readers, *group.heads, *(giver for value in group.cuts if (giver := value.producer()) is not None))
    )
    return _Place(kind=kind, last=last, units=units, size=size, group=follow_units, nodes=nodes, heads=heads)


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


def _changes(
    graph: Graph,
    before: Mapping[str, ir.TensorProtocol | None],
    kept: Mapping[str, Mapping[int, npt.NDArray[np.int64]]],
) -> dict[str, Change]:
    changes = {}
    for name, value in graph.model.graph.initializers.items():
        old, new = before.get(name), value.const_value
        if old is not None and new is not None and new is not old:
            changes[name] = Change(before=old.numpy(), after=new.numpy(), kept=kept.get(name, {}))
    return changes
