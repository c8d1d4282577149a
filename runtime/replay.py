"""Answers of a session on a card for inputs of one shape, in buffers that stay where they are.

A CUDA graph is what the provider launched once, as one thing to launch: a small model is answered in a third of the time. It holds
addresses and shapes, so that each shape has its own buffers and its own graph. ONNX Runtime keeps graphs by thread: where several
threads ask, each captures its own.
Source: ONNX Runtime's CUDA provider, enable_cuda_graph and gpu_graph_id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from onnxpress.manifest import Arrays
from onnxpress.runtime.device import ON_CARD, DeviceArray, DeviceMemory

MOST_GRAPHS = 256  # of a session: ONNX Runtime never lets one go
NO_GRAPH = "-1"  # gpu_graph_id that is not captured

Key = tuple[tuple[str, tuple[int, ...]], ...]


def shapes_of(feeds: Arrays) -> Key:
    """What tells the shapes of inputs from others."""
    return tuple((name, array.shape) for name, array in sorted(feeds.items()))


def run_options(graph: str) -> Any:
    """Options of a run that captures or replays the graph of this number; `NO_GRAPH` does neither."""
    from onnxruntime import RunOptions

    options = RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    return options


class Buffers:
    """Inputs and outputs of a session in a card's memory. Not for several threads at once.

    inner: ONNX Runtime's session. feeds: inputs of the shape that all others will have. outputs: names. graph: its number, or
    `NO_GRAPH` (a run that says nothing is captured, too); None where the session captures none.
    """

    def __init__(self, inner: Any, memory: DeviceMemory, feeds: Arrays, outputs: list[str], graph: str | None) -> None:
        self._inner = inner
        self._options = None if graph is None else run_options(graph)
        self._inputs = {name: memory.empty(array.shape, array.dtype) for name, array in feeds.items()}
        self.write(feeds)
        self._outputs = self._allocated(memory, outputs, None if graph is None else run_options(NO_GRAPH))
        self._binding = inner.io_binding()
        for name, array in self._inputs.items():
            bind(self._binding.bind_input, name, array)
        for name, array in self._outputs.items():
            bind(self._binding.bind_output, name, array)

    def write(self, feeds: Mapping[str, npt.NDArray[Any]]) -> None:
        """Copy inputs to the card."""
        for name, array in feeds.items():
            self._inputs[name].write(array)

    def run(self) -> None:
        """Answer what is on the card, and wait. Nothing is copied."""
        with ON_CARD:
            self._inner.run_with_iobinding(self._binding, self._options)

    def read(self) -> dict[str, npt.NDArray[Any]]:
        """Copies of the outputs."""
        return {name: array.numpy() for name, array in self._outputs.items()}

    def _allocated(self, memory: DeviceMemory, outputs: list[str], options: Any) -> dict[str, DeviceArray]:
        """Arrays of the shapes that one run without a graph gives."""
        first = self._inner.io_binding()
        for name, array in self._inputs.items():
            bind(first.bind_input, name, array)
        for name in outputs:
            first.bind_output(name, "cuda", memory.device_id)
        found = {}
        with ON_CARD:
            self._inner.run_with_iobinding(first, options)
            for name, value in zip(outputs, first.get_outputs(), strict=True):
                found[name] = memory.empty(value.shape(), value.numpy().dtype)
        return found


def bind(how: Any, name: str, array: DeviceArray) -> None:
    """Bind an array on a card, by its address; how: an IOBinding's bind_input or bind_output."""
    how(name, "cuda", array.device_id, array.dtype.type, array.shape, array.address)
