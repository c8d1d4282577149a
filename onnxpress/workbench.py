"""Where a build tries its graphs: saves each to the build's own folder, opens it, and times it.

Weights that the first large graph has are written once: the files of the others are links to that one.

A target whose provider this machine lacks (cuda on a laptop) is tried on the CPU provider, and not timed; bfloat16, which it has no
kernels for, by a graph of float32 that stands in for it. So is a language model for CUDA while it is in float32, and it is not timed
either: half precision would look faster than it is.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.errors import ArtifactError, OutputError, ProviderError
from onnxpress.graph import Graph
from onnxpress.machine import free_memory_bytes
from onnxpress.manifest import Arrays, Runnable, Signature
from onnxpress.optimizers.stand_in import has_bfloat16, in_float32
from onnxpress.optimizers.targets import Target
from onnxpress.runtime.cache import PAST
from onnxpress.runtime.providers import check_provider
from onnxpress.runtime.session import Session
from onnxpress.timing import alternate

# Bytes of weights from which they are a file of their own, which ONNX Runtime maps into memory: weights inside model.onnx are
# copied there, for the 0.5B model of benchmarks/language_shapes.py 572 MiB instead of 343.
_EXTERNAL_FROM = 64_000_000
_WEIGHTS = "weights.data"
_SMALLEST = 256  # bytes of a tensor in a file of its own
# Of the weights' size: a graph is timed beside the one before it, both with their weights packed.
_TIMED_TAKES = 2.5


class Workbench:
    """Opens graphs as sessions on the target's provider, or on the CPU with `note` saying why.

    measure: whether graphs are timed, where they can be.
    """

    def __init__(self, folder: Path, target: Target, *, measure: bool = True) -> None:
        self._folder = folder
        self._target = target
        self._count = 0
        self._written: _Written | None = None
        self.note = untried(target)
        self.timed = measure and not self.note
        self._providers: tuple[str, ...] = ("cpu",) if self.note else target.providers

    @property
    def on_target(self) -> bool:
        """Whether sessions run on the target's own provider."""
        return self._providers == self._target.providers

    def fits(self, graph: Graph) -> bool:
        """Whether free memory allows to time a graph; where it does not, nothing is timed, and `note` says why."""
        needed, free = _TIMED_TAKES * graph.weight_bytes(), free_memory_bytes()
        if not self.timed or free is None or free >= needed:
            return True
        self.timed = False
        self.note = f"not timed: two sessions with packed weights take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        return False

    def open(self, graph: Graph, *, packed: bool = True) -> Session:
        """A session of the graph; its file goes with it.

        packed: with weights in the form that is fastest to multiply. Without, floats are read from the mapped file: prompts take a third
        longer, and no memory is needed for a second copy.
        """
        self._count += 1
        path = self._folder / f"{self._count:03}" / "model.onnx"
        path.parent.mkdir(parents=True)
        if self.stands_in(graph):
            graph = in_float32(graph)
        self._save(graph, path)
        session = Session(
            path,
            signature=graph.signature,
            providers=("cpu",) if self._target.uniform_steps and attends_in_float(graph) else self._providers,
            **session_options(self._target, graph.signature),
            allow_fallback=True,  # of a graph on its way; the artifact has to run on the target alone
            prepacking=packed,
        )
        weakref.finalize(session, shutil.rmtree, path.parent, ignore_errors=True)
        return session

    def _save(self, graph: Graph, path: Path) -> None:
        """As `save`, but weights that are in a file already are linked to. Raises OutputError."""
        try:
            if self._written is None and graph.weight_bytes() >= _EXTERNAL_FROM:
                self._written = _Written(graph, self._folder / _WEIGHTS)
            if self._written is not None and self._written.save(graph, path):
                return
        except OSError as error:
            raise _not_written(path, error) from None
        save(graph, path)

    def stands_in(self, graph: Graph) -> bool:
        """Whether another graph stands in for this one here."""
        return not self.on_target and has_bfloat16(graph)

    def compare(
        self, before: Runnable, after: Runnable, inputs: Callable[[Runnable], Mapping[tuple[int, ...], Arrays]]
    ) -> dict[tuple[int, ...], tuple[float, float]]:
        """Median milliseconds (before, after) of each input, the two taking turns."""
        rows = {}
        given = {"before": (before, inputs(before)), "after": (after, inputs(after))}
        for shape in inputs(before):
            tasks = {name: partial(runnable.run, feeds[shape]) for name, (runnable, feeds) in given.items()}
            times = alternate(tasks)
            rows[shape] = (times["before"], times["after"])
        return rows


def session_options(target: Target, signature: Signature) -> dict[str, Any]:
    """How a graph is opened on a target, as Session and the manifest take it; what is as usual is left out."""
    options: dict[str, Any] = {"disabled_optimizers": list(target.disabled_optimizers)}
    if target.exact_products:
        options["exact_products"] = True
    # A cache of int8 has kernels of its own, with another one for single tokens.
    if not target.flash_attention and any(
        spec.name.startswith(PAST) and spec.dtype == "float32" for spec in signature.inputs
    ):
        options["flash_attention"] = False
    return options


def untried(target: Target) -> str:
    """Why graphs for a target are not tried on its own provider here; nothing where they are."""
    try:
        for provider in target.providers:
            check_provider(provider)
    except ProviderError as error:
        return f"tried on the CPU provider and not timed: {error}"
    return ""


def check_types(path: Path, signature: Signature) -> None:
    """Have ONNX Runtime read a model that it has no kernels for here. Raises ArtifactError where it finds more amiss than that."""
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    try:
        Session(path, signature=signature)
    except ArtifactError as error:
        if not isinstance(error.__cause__, NoKernel):
            raise


def attends_in_float(graph: Graph) -> bool:
    """Whether a language model's attention is in float32, for which the CUDA provider has no kernel."""
    attentions = (node for node in graph.model.graph if node.op_type == "GroupQueryAttention")
    return any(node.inputs[0] is not None and node.inputs[0].dtype == ir.DataType.FLOAT for node in attentions)


class RowByRow:
    """Runs each row of a batch alone, as the runner of an artifact does whose answers move with their batch-mates."""

    def __init__(self, inner: Runnable) -> None:
        self._inner = inner

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names that `run` takes."""
        return self._inner.input_names

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Answer one batch."""
        batch = len(next(iter(feeds.values())))
        rows = [{name: array[row : row + 1] for name, array in feeds.items()} for row in range(batch)]
        answers = [self._inner.run(row) for row in rows]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}


class _Written:
    """The weights of a graph, written to a file, for the graphs that have them too."""

    def __init__(self, graph: Graph, path: Path) -> None:
        self._path = path
        tensors = [tensor for _, tensor in _outside(graph.model)]
        places = ir.external_data.convert_tensors_to_external(tensors, path.parent, path.name)
        # By identity, which clones of a graph share; held, so that no other tensor takes it.
        self._places = {id(tensor): (tensor, place) for tensor, place in zip(tensors, places, strict=True)}

    def save(self, graph: Graph, path: Path) -> bool:
        """Write model.onnx with these weights linked and others beside it; False where no file can be linked, or none is there."""
        model = graph.model.clone()
        outside = _outside(model)
        new = [tensor for _, tensor in outside if id(tensor) not in self._places]
        if len(new) == len(outside):
            return False
        link = path.with_name(self._path.name)
        try:
            os.link(self._path, link)
        except OSError:  # some file systems have no links
            return False
        places = {key: _elsewhere(place, link) for key, (_, place) in self._places.items()}
        if new:
            written = ir.external_data.convert_tensors_to_external(new, path.parent, f"{path.name}.data")
            places |= {id(tensor): place for tensor, place in zip(new, written, strict=True)}
        for value, tensor in outside:
            value.const_value = places[id(tensor)]
        ir.save(model, path)
        return True


def _outside(model: ir.Model) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """Constants that belong in a file of their own, subgraphs included: large ones, and those that are in some other file now."""
    return [
        (value, value.const_value)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
        and (value.const_value.nbytes >= _SMALLEST or isinstance(value.const_value, ir.ExternalTensor))
    ]


def _elsewhere(place: ir.ExternalTensor, path: Path) -> ir.ExternalTensor:
    """The same numbers by another name of their file."""
    return ir.ExternalTensor(
        path.name, place.offset, place.length, place.dtype, shape=place.shape, name=place.name, base_dir=path.parent
    )


def save(graph: Graph, path: Path) -> None:
    """Write model.onnx, and model.onnx.data beside it when the weights are large. Raises OutputError."""
    external = f"{path.name}.data" if graph.weight_bytes() >= _EXTERNAL_FROM else None
    try:
        ir.save(graph.model, path, external_data=external)
    except OSError as error:
        raise _not_written(path, error) from None


def _not_written(path: Path, error: OSError) -> OutputError:
    return OutputError(f"Writing {path} failed: {error.strerror or error}. Free space or choose another --out.")
