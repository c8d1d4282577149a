"""Runs calibration inputs through a graph: for the ranges or histograms of chosen values, or along with a pass that changes it.

Nothing grows with the number of inputs but what `ActivationStream` holds of the layer it stands at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.manifest import Arrays, Runnable, Signature, TensorSpec
from onnxpress.optimizers.base import ChannelRange, Distribution
from onnxpress.optimizers.rounding import Float

_NO_INPUTS = (
    "No calibration inputs are left: the samples judge already, or are too short. Give others with `calibration`."
)
# Of large images, as many are walked along a graph as make so many bytes: what a layer answers to them can be 20 times that.
_WALKED_BYTES, _LEAST_WALKED = 2**26, 8
_BINS = 8192  # of a histogram; 255 steps of a one-sided range then have at least 8 bins each


class Calibration:
    """Ranges and distributions of values, measured once and reused: a pass's `observe` and `distributions`.

    An activation is reduced to a few numbers for each channel, or to a histogram, as soon as it is there.

    open_session: opens a graph; inputs: gives the calibration inputs anew at each call.
    """

    def __init__(self, open_session: Callable[[Graph], Runnable], inputs: Callable[[], Iterable[Arrays]]) -> None:
        self._open = open_session
        self._inputs = inputs
        self._known: dict[str, ChannelRange] = {}
        self._distributions: dict[str, Distribution] = {}

    def __call__(self, graph: Graph, names: Sequence[str]) -> Mapping[str, ChannelRange]:
        """Ranges of the named values; values seen before, by name, are not measured again.

        Raises RecipeError where there are no calibration inputs, or a value is not finite on them.
        """
        missing = [name for name in names if name not in self._known]
        if missing:
            self._known.update(self._measure(graph, missing))
        return {name: self._known[name] for name in names}

    def distributions(self, graph: Graph, names: Sequence[str], *, counted: bool) -> Mapping[str, Distribution]:
        """Distributions of the named values, of any shape; values seen before, by name, are not measured again.

        counted: with histograms. Raises RecipeError where there are no calibration inputs, or a value is not finite on them.
        """
        missing = [
            name
            for name in names
            if name not in self._distributions or (counted and not self._distributions[name].counts.size)
        ]
        found = {name: Histogram() for name in missing}
        walk = activations(graph, missing, open_session=self._open, inputs=self._inputs) if missing else ()
        for answers in walk:
            for name, histogram in found.items():
                if not histogram.add(answers[name], counted=counted):
                    raise RecipeError(_not_finite(name))
        if any(histogram.low > histogram.high for histogram in found.values()):
            raise RecipeError(_NO_INPUTS)
        self._distributions.update({name: histogram.distribution() for name, histogram in found.items()})
        return {name: self._distributions[name] for name in names}

    def _measure(self, graph: Graph, names: Sequence[str]) -> dict[str, ChannelRange]:
        low: dict[str, np.ndarray] = {}
        high: dict[str, np.ndarray] = {}
        for answers in activations(graph, names, open_session=self._open, inputs=self._inputs):
            for name in names:
                flat = answers[name].reshape(-1, answers[name].shape[-1])
                minimum, maximum = flat.min(axis=0), flat.max(axis=0)
                low[name] = np.minimum(low.get(name, minimum), minimum)
                high[name] = np.maximum(high.get(name, maximum), maximum)
        if len(low) < len(names):
            raise RecipeError(_NO_INPUTS)
        for name in names:
            if not (np.isfinite(low[name]).all() and np.isfinite(high[name]).all()):
                raise RecipeError(_not_finite(name))
        return {name: ChannelRange(low=low[name], high=high[name]) for name in names}


class Histogram:
    """Counts numbers in equal bins over [-limit, limit]; limit doubles, and bins join in pairs, whenever a number lies outside.

    One walk over the inputs is enough, and memory is the bins. At least half of each side's bins lie within the largest number.
    """

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self._limit = 0.0
        self._counts = np.zeros(0, np.int64)

    def add(self, array: npt.NDArray[Any], *, counted: bool) -> bool:
        """Take the numbers of an array in; False where one of them is not finite."""
        if array.size == 0:
            return True
        low, high = float(array.min()), float(array.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        if counted:
            self._count(array, max(-low, high, float(np.finfo(np.float32).tiny)))
        return True

    def distribution(self) -> Distribution:
        """What was counted."""
        return Distribution(low=self.low, high=self.high, limit=self._limit, counts=self._counts)

    def _count(self, array: npt.NDArray[Any], largest: float) -> None:
        if not self._counts.size:
            self._limit, self._counts = largest, np.zeros(_BINS, np.int64)
        while largest > self._limit:
            joined = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.pad(joined, _BINS // 4)
            self._limit *= 2
        self._counts += np.histogram(array, bins=_BINS, range=(-self._limit, self._limit))[0]


def activations(
    graph: Graph,
    names: Sequence[str],
    *,
    open_session: Callable[[Graph], Runnable],
    inputs: Callable[[], Iterable[Arrays]],
) -> Iterator[Arrays]:
    """The named values of a graph (and its outputs) for one calibration input after another."""
    observed = graph.clone()
    body = observed.model.graph
    values: dict[str, ir.Value] = {str(value.name): value for node in body for value in node.outputs}
    given = {str(value.name) for value in (*body.inputs, *body.outputs)}
    body.outputs.extend(values[name] for name in names if name not in given)
    session = open_session(observed)
    for feeds in inputs():
        yield {**feeds, **session.run({name: feeds[name] for name in session.input_names})}


class ActivationStream:
    """Walks a graph from its inputs to its outputs, one part at a time, while a pass changes what is ahead.

    It stands at some place of `graph`, all of whose nodes before that place have run and must not change any more. What later parts
    need of them is kept, everything else dropped: each layer is calibrated on what the layers before it really answer, already
    changed ones included, every node runs once, and memory holds one layer's activations.

    open_session: opens a graph; inputs: gives the calibration inputs anew at each call, the same each time; of large ones the first are
    walked with.
    """

    def __init__(
        self, graph: Graph, open_session: Callable[[Graph], Runnable], inputs: Callable[[], Iterable[Arrays]]
    ) -> None:
        self._body = graph.model.graph
        self._model = graph.model
        self._open = open_session
        self._inputs = inputs
        self._live: dict[str, list[npt.NDArray[Any]]] = {}
        self._done: set[ir.Node] = set()

    def second_moments(self, value: ir.Value) -> Float:
        """Mean of x xᵀ over all vectors x along the last axis of a value, (width, width): runs the graph up to there.

        Raises RecipeError where there are no calibration inputs.
        """
        arrays = self._at(value)
        moments: Float | None = None
        count = 0
        for array in arrays:
            vectors = array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)
            product = vectors.T @ vectors
            moments = product if moments is None else moments + product
            count += len(vectors)
        if moments is None:
            raise RecipeError(_NO_INPUTS)
        return moments / np.float32(max(count, 1))

    def divide(self, value: ir.Value, by: Float) -> None:
        """Say that `value`, whose second moments were asked for, is now divided by `by` along its last axis."""
        self._live[str(value.name)] = [array / by for array in self._live[str(value.name)]]

    def means(self, value: ir.Value, axis: int) -> npt.NDArray[np.float64]:
        """Mean of a value at each position of `axis` over everything else, (channels,): runs the graph up to there.

        Raises RecipeError where there are no calibration inputs.
        """
        total: npt.NDArray[np.float64] | None = None
        count = 0
        for array in self._at(value):
            others = tuple(other for other in range(array.ndim) if other != axis % array.ndim)
            part = array.sum(axis=others, dtype=np.float64)
            total = part if total is None else total + part
            count += array.size // len(part)
        if total is None:
            raise RecipeError(_NO_INPUTS)
        return total / max(count, 1)

    def add(self, value: ir.Value, by: Float, axis: int) -> None:
        """Say that to `value`, whose means were asked for, `by` (channels,) is now added along an axis."""
        arrays = self._live[str(value.name)]
        shapes = [[-1 if other == axis % array.ndim else 1 for other in range(array.ndim)] for array in arrays]
        self._live[str(value.name)] = [array + by.reshape(shape) for array, shape in zip(arrays, shapes, strict=True)]

    def _at(self, value: ir.Value) -> list[npt.NDArray[Any]]:
        """A value for each calibration input, where the walk stands at it or gets there."""
        name = str(value.name)
        if value.is_graph_input():
            return [feeds[name] for feeds in self._walked()]
        if name not in self._live:
            self._advance(value)
        return self._live[name]

    def _walked(self) -> Iterator[Arrays]:
        """The calibration inputs, as far as memory goes."""
        total = 0
        for index, feeds in enumerate(self._inputs()):
            total += sum(array.nbytes for array in feeds.values())
            if index >= _LEAST_WALKED and total > _WALKED_BYTES:
                return
            yield feeds

    def _advance(self, value: ir.Value) -> None:
        """Run the nodes up to and including the one that gives `value`."""
        given = {str(item.name) for item in self._body.inputs}
        part: list[ir.Node] = []
        for node in self._body:
            if node not in self._done:
                part.append(node)
            if node is value.producer():
                break
        inside = set(part)
        needed = dict.fromkeys(
            source
            for node in part
            for source in _sources(node)
            if source.producer() not in inside and (str(source.name) in self._live or str(source.name) in given)
        )
        outputs = [
            output
            for node in part
            for output in node.outputs
            if output is value or any(use.node not in inside for use in output.uses())
        ]
        kept: dict[str, list[npt.NDArray[Any]]] = {str(output.name): [] for output in outputs}
        session: Runnable | None = None
        for index, feeds in enumerate(self._walked()):
            feeds = {name: feeds[name] if name in given else self._live[name][index] for name in map(_name, needed)}
            session = session or self._open(self._cut(list(needed), outputs, feeds))
            answers = session.run(feeds)
            for name, arrays in kept.items():
                arrays.append(answers[name])
        self._done |= inside
        self._live.update(kept)
        ahead = {source for node in self._body if node not in self._done for source in map(_name, _sources(node))}
        ahead.add(str(value.name))
        self._live = {name: arrays for name, arrays in self._live.items() if name in ahead}

    def _cut(self, inputs: list[ir.Value], outputs: list[ir.Value], feeds: Arrays) -> Graph:
        """The nodes between as a graph of their own."""
        body = ir.convenience.extract(self._body, inputs, outputs)
        # Shapes are free but for widths into Attention: where ONNX Runtime does not know one, it infers an output of width 0.
        for value in body.inputs:
            array = feeds[str(value.name)]
            value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
            axes: list[int | str] = [f"{value.name}_{axis}" for axis in range(array.ndim)]
            value.shape = ir.Shape([*axes[:-1], array.shape[-1]] if axes and _is_attended(value) else axes)
        for node in body:  # shapes that passes left behind may not hold for a part
            for output in node.outputs:
                width = output.shape[-1] if _is_attended(output) and output.shape is not None else None
                output.shape = (
                    ir.Shape([None, None, width]) if isinstance(width, int) and len(output.shape or ()) == 3 else None
                )
        specs = tuple(
            TensorSpec(
                name=str(value.name),
                dtype=feeds[str(value.name)].dtype.name,
                shape=tuple(f"{value.name}_{axis}" for axis in range(feeds[str(value.name)].ndim)),
            )
            for value in body.inputs
        )
        named = tuple(TensorSpec(name=str(value.name), dtype="float32", shape=()) for value in body.outputs)
        model = ir.Model(body, ir_version=self._model.ir_version)
        return Graph(model=model, signature=Signature(task="module", inputs=specs, outputs=named))


def _sources(node: ir.Node) -> list[ir.Value]:
    """What a node reads, its subgraphs included."""
    nodes = [node]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            nodes += attribute.as_graph().all_nodes()
    return [value for item in nodes for value in item.inputs if value is not None]


def _is_attended(value: ir.Value) -> bool:
    """Whether Attention reads a value as queries, keys or values."""
    return any(use.node.op_type == "Attention" and use.idx < 3 for use in value.uses())


def _not_finite(name: str) -> str:
    return (
        f"The value {name} of the graph is not finite on the calibration inputs, so that it has no range: take inputs without NaN and "
        "infinity, for which the model gives finite numbers."
    )


def _name(value: ir.Value) -> str:
    return str(value.name)
