"""Runs calibration inputs through a graph, one at a time, and keeps the range of chosen values for each channel.

Memory stays bounded: an activation is reduced to its minimum and maximum as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.manifest import Arrays, Runnable
from onnxpress.optimizers.base import ChannelRange


class Calibration:
    """Ranges of values, measured once and reused: call it as a pass's `observe`.

    open_session: opens a graph; inputs: gives the calibration inputs anew at each call.
    """

    def __init__(self, open_session: Callable[[Graph], Runnable], inputs: Callable[[], Iterable[Arrays]]) -> None:
        self._open = open_session
        self._inputs = inputs
        self._known: dict[str, ChannelRange] = {}

    def __call__(self, graph: Graph, names: Sequence[str]) -> Mapping[str, ChannelRange]:
        """Ranges of the named values; values seen before, by name, are not measured again.

        Raises RecipeError where there are no calibration inputs.
        """
        missing = [name for name in names if name not in self._known]
        if missing:
            self._known.update(self._measure(graph, missing))
        return {name: self._known[name] for name in names}

    def _measure(self, graph: Graph, names: Sequence[str]) -> dict[str, ChannelRange]:
        observed = graph.clone()
        body = observed.model.graph
        values: dict[str, ir.Value] = {str(value.name): value for value in body.inputs}
        for node in body:
            values.update({str(value.name): value for value in node.outputs})
        inputs = {str(value.name) for value in body.inputs}
        outputs = {str(value.name) for value in body.outputs}
        body.outputs.extend(values[name] for name in names if name not in outputs | inputs)
        session = self._open(observed)
        low: dict[str, np.ndarray] = {}
        high: dict[str, np.ndarray] = {}
        for feeds in self._inputs():
            answers = {**feeds, **session.run(feeds)}
            for name in names:
                flat = answers[name].reshape(-1, answers[name].shape[-1])
                minimum, maximum = flat.min(axis=0), flat.max(axis=0)
                low[name] = np.minimum(low.get(name, minimum), minimum)
                high[name] = np.maximum(high.get(name, maximum), maximum)
        if len(low) < len(names):
            raise RecipeError(
                "No calibration inputs are left beside the evaluation texts: give others with `calibration`."
            )
        return {name: ChannelRange(low=low[name], high=high[name]) for name in names}
