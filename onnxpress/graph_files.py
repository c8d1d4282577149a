"""Writes graphs to files: small ones whole, large ones with their weights in a file beside them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.errors import OutputError
from onnxpress.graph import Graph, Widened

# Bytes of weights from which they are a file of their own, which ONNX Runtime maps into memory: weights inside model.onnx are
# copied there, for the 0.5B model of benchmarks/language_shapes.py 572 MiB instead of 343.
_EXTERNAL_FROM = 64_000_000
_MOVING = ("Gather", "Transpose")
_INSIDE = 256  # bytes of a constant in model.onnx at most: ONNX Runtime infers shapes from those


def save(graph: Graph, path: Path) -> None:
    """Write model.onnx, and model.onnx.data beside it when the weights are large. Raises OutputError."""
    try:
        if weights_are_large(graph):
            WrittenWeights(graph, beside(path)).save(graph, path)
        else:
            ir.save(graph.model, path)
    except OSError as error:
        raise not_written(path, error) from None


class WrittenWeights:
    """The weights of a graph, written to a file, for the graphs of its folder that have them too. Raises OSError.

    halves: whether constants that are kept in half precision are written so, and widened by the graph where it reads them.
    """

    def __init__(self, graph: Graph, path: Path, *, halves: bool = False) -> None:
        tensors = [tensor for _, tensor in _large(graph.model)]
        places = _write([tensor.half if halves and isinstance(tensor, Widened) else tensor for tensor in tensors], path)
        # By identity, which clones of a graph share; held, so that no other tensor takes it.
        self._places = {id(tensor): (tensor, place) for tensor, place in zip(tensors, places, strict=True)}

    def take(self, graph: Graph) -> None:
        """Have a graph read its weights from the file, mapped into memory, and hold those that were in memory no longer."""
        mapped = _map(graph, {key: place for key, (_, place) in self._places.items()})
        self._places = {
            id(held): (held, place)
            for key, (tensor, place) in self._places.items()
            for held in (mapped.get(key, tensor),)
        }

    def place(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor | None:
        """Where in the file a tensor is."""
        return self._places.get(id(tensor), (None, None))[1]

    def save(self, graph: Graph, path: Path) -> None:
        """Write a graph to this folder, and the weights that are not there yet beside it, from where the graph reads them then. Raises OSError."""
        model = graph.model.clone()
        large = _large(model)
        places = {key: place for key, (_, place) in self._places.items()}
        if new := [tensor for _, tensor in large if id(tensor) not in places]:
            written = {id(tensor): place for tensor, place in zip(new, _write(new, beside(path)), strict=True)}
            places |= written
        for value, tensor in large:
            value.const_value = places[id(tensor)]
            if value.const_value.dtype != tensor.dtype:
                _widen_where_it_is_read(value)
        ir.save(model, path)
        if new:
            _map(graph, written)


def _map(graph: Graph, places: Mapping[int, ir.ExternalTensor]) -> dict[int, ir.TensorProtocol]:
    """Have a graph read constants from files, by the identities of those that it holds; gives what it holds then by the same."""
    mapped: dict[int, ir.TensorProtocol] = {}
    files: dict[str, np.ndarray[Any, Any]] = {}  # one mapping each: it keeps the file open
    for value, tensor in _large(graph.model):
        place = places.get(id(tensor))
        start = 0 if place is None else place.offset or 0
        if place is None or place.dtype.bitwidth < 8 or start % place.dtype.itemsize:
            continue  # not as numpy has them
        if place.path not in files:
            files[place.path] = np.asarray(np.memmap(place.path, mode="r"))
        if id(tensor) not in mapped:
            part = files[place.path][start : start + place.nbytes]
            array = part.view(place.dtype.numpy()).reshape(place.shape.numpy())
            read = ir.Tensor(array, dtype=place.dtype, name=tensor.name)
            mapped[id(tensor)] = read if place.dtype == tensor.dtype else Widened(read)
        value.const_value = mapped[id(tensor)]
    return mapped


def _write(tensors: list[ir.TensorProtocol], path: Path) -> list[ir.ExternalTensor]:
    """Write tensors to a file, one after the other, and say where they are. Raises OSError."""
    laid_out = [
        ir.LazyTensor(partial(_contiguous, tensor), tensor.dtype, shape=ir.Shape(tensor.shape), name=tensor.name)
        if isinstance(tensor, ir.Tensor | Widened)
        else tensor
        for tensor in tensors
    ]
    return ir.external_data.convert_tensors_to_external(laid_out, path.parent, path.name)


def _contiguous(tensor: ir.Tensor[Any] | Widened) -> ir.Tensor[Any] | Widened:
    """A transposed view as a copy: written element by element it takes twice as long."""
    raw = tensor.numpy() if isinstance(tensor, Widened) else tensor.raw
    if not isinstance(raw, np.ndarray) or raw.flags.c_contiguous:
        return tensor
    return ir.Tensor(np.ascontiguousarray(raw), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)


def _widen_where_it_is_read(value: ir.Value) -> None:
    """Cast a constant of half precision to float32 right before each node that computes with it, and right behind those that move its numbers."""
    assert value.const_value is not None
    value.type = ir.TensorType(value.const_value.dtype)
    for node, index in list(value.uses()):
        graph, moved = node.graph, node.outputs[0]
        assert graph is not None
        if node.domain == "" and node.op_type in _MOVING and index == 0 and not moved.is_graph_output():
            moved.type = value.type
            cast = ir.node("Cast", [moved], {"to": ir.DataType.FLOAT})
            for reader, place in list(moved.uses()):
                if reader is not cast:
                    reader.replace_input_with(place, cast.outputs[0])
            graph.insert_after(node, cast)
        else:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
            node.replace_input_with(index, cast.outputs[0])
            graph.insert_before(node, cast)
        source = cast.inputs[0]
        assert source is not None
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), source.shape


def weights_are_large(graph: Graph) -> bool:
    """Whether a graph's weights are a file of their own."""
    return sum(tensor.nbytes for _, tensor in _large(graph.model)) >= _EXTERNAL_FROM


def beside(path: Path) -> Path:
    """The file with a graph's weights."""
    return path.with_name(f"{path.name}.data")


def not_written(path: Path, error: OSError) -> OutputError:
    """What to raise where a file cannot be written."""
    return OutputError(f"Writing {path} failed: {error.strerror or error}. Free space or choose another --out.")


def _large(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """Constants for a file of their own, those of subgraphs too. Text is none: it has no such form."""
    return [
        (value, value.const_value)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype != ir.DataType.STRING
        and value.const_value.nbytes > _INSIDE
    ]
