"""One copy of a model's weights for the original and its graph: the file that the graph reads them from."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from onnxpress.graph import Graph, Widened

Place = Callable[[ir.TensorProtocol], ir.ExternalTensor | None]


def share_weights(module: torch.nn.Module, graph: Graph, write: Callable[[Graph], Place]) -> None:
    """Have a module read its weights from where `write` puts those of its graph: a file, which is mapped into memory.

    A file's pages are in memory once, whoever reads them, and leave it where something else needs the room. What the
    module writes to them stays its own. Weights whose memory the graph does not share stay as they are.
    """
    parameters = {weight.data_ptr(): weight for weight in module.parameters()}
    shared: list[tuple[torch.nn.Parameter, ir.Value, tuple[int, ...]]] = []
    for value in graph.model.graph.initializers.values():
        if value.const_value is None or value.const_value.dtype == ir.DataType.STRING:
            continue
        constant = value.const_value
        array: np.ndarray[Any, Any] = (constant.half if isinstance(constant, Widened) else constant).numpy()
        weight, axes = parameters.get(array.ctypes.data), axes_in_memory(array)
        if weight is not None and weight.is_contiguous() and array.transpose(axes).shape == tuple(weight.shape):
            shared.append((weight, value, axes))
    array = np.empty(0)  # the last one is not held
    place_of = write(graph)
    files: dict[str, torch.Tensor] = {}
    for weight, value, axes in shared:
        assert value.const_value is not None
        place = place_of(value.const_value)
        if place is None or (place.offset or 0) % weight.element_size():
            continue
        path, start = place.path, place.offset or 0
        if path not in files:
            size = Path(path).stat().st_size
            files[path] = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
        part = files[path][start : start + weight.nbytes].view(weight.dtype)
        weight.data = part.view(*place.shape.numpy()).permute(axes)
    gc.collect()  # what has traced the module may hold its weights in a circle


def read_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's memory as numpy has it, bfloat16 too."""
    bfloat16 = tensor.dtype == torch.bfloat16
    array: np.ndarray[Any, Any] = (tensor.view(torch.uint16) if bfloat16 else tensor).numpy()
    return array.view(ir.DataType.BFLOAT16.numpy()) if bfloat16 else array


def axes_in_memory(array: np.ndarray[Any, Any]) -> tuple[int, ...]:
    """The order of axes in which an array's elements follow each other in memory: that of a graph's matrix is transposed."""
    return tuple(sorted(range(array.ndim), key=lambda axis: -array.strides[axis]))
