"""Where a build tries its graphs: saves each to the build's own folder, opens it, and times it.

A target whose provider this machine lacks (cuda on a laptop) is tried on the CPU provider, and not timed; bfloat16, which it has no
kernels for, by a graph of float32 that stands in for it. So is a language model for CUDA while it is in float32, and it is not timed
either: half precision would look faster than it is.
"""

from __future__ import annotations

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


class Workbench:
    """Opens graphs as sessions on the target's provider, or on the CPU with `note` saying why."""

    def __init__(self, folder: Path, target: Target) -> None:
        self._folder = folder
        self._target = target
        self._count = 0
        self.note = untried(target)
        self.timed = not self.note
        self._providers: tuple[str, ...] = ("cpu",) if self.note else target.providers

    @property
    def on_target(self) -> bool:
        """Whether sessions run on the target's own provider."""
        return self._providers == self._target.providers

    def open(self, graph: Graph) -> Session:
        """A session of the graph; its file goes with it."""
        self._count += 1
        path = self._folder / f"{self._count:03}" / "model.onnx"
        path.parent.mkdir(parents=True)
        if self.stands_in(graph):
            graph = in_float32(graph)
        save(graph, path)
        session = Session(
            path,
            signature=graph.signature,
            providers=("cpu",) if self._target.uniform_steps and attends_in_float(graph) else self._providers,
            **session_options(self._target, graph.signature),
            allow_fallback=True,  # of a graph on its way; the artifact has to run on the target alone
        )
        weakref.finalize(session, shutil.rmtree, path.parent, ignore_errors=True)
        return session

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


def save(graph: Graph, path: Path) -> None:
    """Write model.onnx, and model.onnx.data beside it when the weights are large. Raises OutputError."""
    external = f"{path.name}.data" if graph.weight_bytes() >= _EXTERNAL_FROM else None
    try:
        ir.save(graph.model, path, external_data=external)
    except OSError as error:
        raise OutputError(
            f"Writing {path} failed: {error.strerror or error}. Free space or choose another --out."
        ) from None
