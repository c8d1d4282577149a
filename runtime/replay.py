"""Answers of a session on a card for inputs of one shape, in buffers that stay where they are.

A CUDA graph is what the provider launched once, as one thing to launch: a small model is answered in a third of the time. It holds
addresses and shapes, so that each shape has its own buffers and its own graph. ONNX Runtime keeps graphs by thread: where several
threads ask, each captures its own.
Source: ONNX Runtime's CUDA provider, enable_cuda_graph and gpu_graph_id.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from onnxpress.manifest import Arrays, Signature
from onnxpress.runtime.bfloat16 import has_bfloat16
from onnxpress.runtime.device import ON_CARD, DeviceArray, DeviceMemory, item_bytes

MOST_GRAPHS = 256  # of a session: ONNX Runtime never lets one go
NO_GRAPH = "-1"  # gpu_graph_id that is not captured
# How much they answer is read back in the middle of a run, which a graph cannot hold.
_COUNT_AS_THEY_GO = frozenset(("NonZero", "Compress", "Unique", "NonMaxSuppression"))

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


def can_be_replayed(inner: Any, signature: Signature) -> bool:
    """Whether all inputs are read on the card, and the shapes of outputs, and of all between, hang on the inputs' alone.

    A shape, a position or a number of elements that is an input is read on the CPU, when it is bound. inner: of a session that has
    recorded its placement.
    """
    if counts_as_it_goes(inner):
        return False
    axes = {axis for spec in signature.inputs for axis in spec.shape}
    if not axes.issuperset(axis for spec in signature.outputs for axis in spec.shape if isinstance(axis, str)):
        return False
    if has_bfloat16(signature):  # whose arrays here are float32
        return False
    if signature.task not in ("module", "text-generation"):  # these take tokens and masks alone
        return True
    places = [info.name.lower() for info in inner.get_input_memory_infos()]
    return not any("cpu" in place or "pinned" in place for place in places)


def counts_as_it_goes(inner: Any) -> bool:
    """Whether a session that has recorded its placement has operators whose answers' shapes hang on values."""
    parts = inner.get_provider_graph_assignment_info()
    return any(node.op_type in _COUNT_AS_THEY_GO for part in parts for node in part.get_nodes())


def bytes_of(feeds: Arrays, signature: Signature) -> int:
    """Bytes of inputs, and of the outputs that they bring."""
    sizes: dict[str | int, int] = {}
    for spec in signature.inputs:
        sizes.update(zip(spec.shape, feeds[spec.name].shape, strict=True))
    outputs = sum(
        math.prod(sizes.get(axis, axis if isinstance(axis, int) else 0) for axis in spec.shape) * item_bytes(spec.dtype)
        for spec in signature.outputs
    )
    return outputs + sum(array.nbytes for array in feeds.values())


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
            array.bind(self._binding.bind_input, name)
        for name, array in self._outputs.items():
            array.bind(self._binding.bind_output, name)

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
            array.bind(first.bind_input, name)
        for name in outputs:
            first.bind_output(name, "cuda", memory.device_id)
        found = {}
        with ON_CARD:
            self._inner.run_with_iobinding(first, options)
            for name, value in zip(outputs, first.get_outputs(), strict=True):
                found[name] = memory.empty(value.shape(), value.numpy().dtype)
        return found
