"""Where a build tries its graphs: saves each to the build's own folder, opens it, and times it.

Weights that the first large graph has are written once, for all of them.

A target whose provider this machine lacks (cuda on a laptop) is tried on the CPU provider, and not timed; half precision, which it does
not compute in, by a graph of float32 that stands in for it. So is a language model for CUDA while it is in float32, and it is not timed
either: half precision would look faster than it is.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxpress.errors import ArtifactError, ProviderError
from onnxpress.graph import Graph
from onnxpress.graph_files import WrittenWeights, beside, not_written, save, weights_are_large
from onnxpress.machine import free_memory_bytes
from onnxpress.manifest import Arrays, Runnable
from onnxpress.optimizers.stand_in import HALVES, holds_bfloat16, holds_half, in_float32
from onnxpress.optimizers.targets import Target
from onnxpress.runtime.cache import PAST
from onnxpress.runtime.providers import check_provider
from onnxpress.runtime.session import Session
from onnxpress.timing import alternate

_NO_NUMBERS = frozenset((ir.DataType.BOOL, ir.DataType.STRING, ir.DataType.UNDEFINED))
# Of the weights' size: a graph is timed beside the one before it, both with their weights packed.
_TIMED_TAKES = 2.5
_numbers = itertools.count(1)  # one for all: what is left of an earlier session removes its own file, and no other's


class Workbench:
    """Opens graphs as sessions on the target's provider, or on the CPU with `note` saying why.

    measure: whether graphs are timed, where they can be. half_from_the_start: whether the original computes in half precision.
    """

    def __init__(self, folder: Path, target: Target, *, measure: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._target = target
        self._written: WrittenWeights | None = None
        self.note = untried(target)
        self.timed = measure and not self.note
        self.half_from_the_start = False
        self._providers: tuple[str, ...] = ("cpu",) if self.note else target.providers

    @property
    def on_target(self) -> bool:
        """Whether sessions run on the target's own provider."""
        return self._providers == self._target.providers

    def too_large(self, graph: Graph) -> str:
        """Why a graph is too large to be timed on this CPU: nothing is timed then. Nothing where it is not."""
        needed, free = _TIMED_TAKES * graph.weight_bytes(), free_memory_bytes()
        if not self.timed or self._providers != ("cpu",) or free is None or free >= needed:
            return ""
        self.timed = False
        why = f"two sessions with packed weights take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        self.note = f"not timed: {why}"
        return why

    def write_weights(self, graph: Graph) -> Callable[[ir.TensorProtocol], ir.ExternalTensor | None]:
        """Write a graph's weights to a file that it, and those that are made of it, read them from; says where each is. Raises OutputError."""
        path = self._folder / "weights.data"
        try:
            self._written = WrittenWeights(graph, path, halves=True)
        except OSError as error:
            raise not_written(path, error) from None
        self._written.take(graph)
        return self._written.place

    def open(self, graph: Graph, *, itself: bool = False) -> Session:
        """A session of the graph, or of its stand-in but for `itself`; its file goes with it.

        Weights are in the form that is fastest to multiply. Where nothing is timed, those of a graph in floating point are read from the
        mapped file instead: prompts take a third longer, and no memory is needed for a second copy.
        """
        path = self._folder / f"{next(_numbers):03}.onnx"
        stand_in = not itself and self.stands_in(graph)
        if stand_in:
            graph = in_float32(graph)
        try:
            if self._written is None and not stand_in and weights_are_large(graph):
                self.write_weights(graph)
            if self._written is None or stand_in:
                save(graph, path)
            else:
                self._written.save(graph, path)
        except OSError as error:
            raise not_written(path, error) from None
        session = Session(
            path,
            signature=graph.signature,
            providers=("cpu",) if self._target.uniform_steps and attends_in_float(graph) else self._providers,
            **session_options(self._target, graph),
            allow_fallback=True,  # of a graph on its way; the artifact has to run on the target alone
            prepacking=self.timed or _is_quantized(graph),
            as_written=graph.widens(),
        )
        weakref.finalize(session, _remove, path, beside(path))
        return session

    def stands_in(self, graph: Graph) -> bool:
        """Whether another graph stands in for this one in trials here: of half precision, but for float16 in which the original itself computes."""
        return not self.on_target and (holds_bfloat16(graph) or (holds_half(graph) and not self.half_from_the_start))

    def runs(self, graph: Graph) -> bool:
        """Whether the graph itself runs here, on whichever provider."""
        return self.on_target or not holds_bfloat16(graph)

    def compare(
        self, before: Runnable, after: Runnable, inputs: Callable[[Runnable], Mapping[tuple[int, ...], Arrays]]
    ) -> dict[str, tuple[float, float]]:
        """Median milliseconds (before, after) of each input, the two taking turns; an input is called 1x128."""
        rows = {}
        given = {"before": (before, inputs(before)), "after": (after, inputs(after))}
        for shape in given["before"][1]:
            times = alternate({name: partial(runnable.run, feeds[shape]) for name, (runnable, feeds) in given.items()})
            rows["x".join(map(str, shape))] = (times["before"], times["after"])
        return rows


def session_options(target: Target, graph: Graph) -> dict[str, Any]:
    """How a graph is opened on a target, as Session and the manifest take it; what is as usual is left out."""
    options: dict[str, Any] = {"disabled_optimizers": [*target.disabled_optimizers, *fatal_optimizers(graph.model)]}
    if target.exact_products and ("cpu" in target.providers or _is_quantized(graph)):
        options["exact_products"] = True
    if target.half_floats and (holds_bfloat16(graph) or _is_quantized(graph)):
        options["half_floats"] = True
    # A cache of int8 has kernels of its own, with another one for single tokens.
    if not target.flash_attention and any(
        spec.name.startswith(PAST) and spec.dtype == "float32" for spec in graph.signature.inputs
    ):
        options["flash_attention"] = False
    return options


def fatal_optimizers(model: ir.Model) -> tuple[str, ...]:
    """Optimizers of ONNX Runtime that can end the process where a model computes in half precision.

    NchwcTransformer reads what MatmulTransposeFusion leaves unfinished of Transpose, Cast and MatMul, on x86 (onnxruntime 1.24 to 1.32 at
    least, microsoft/onnxruntime#28392). It is for convolutions in float32 on the CPU, which weights that are stored in half precision
    leave as they are.
    """
    for node in model.graph.all_nodes():
        dtypes = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
        if node.op_type == "Cast":
            dtypes = {ir.DataType(node.attributes["to"].as_int())}
        if not dtypes.isdisjoint(HALVES):
            return ("NchwcTransformer",)
    return ()


def untried(target: Target) -> str:
    """Why graphs for a target are not tried on its own provider here; nothing where they are."""
    try:
        for provider in target.providers:
            check_provider(provider)
    except ProviderError as error:
        return f"tried on the CPU provider and not timed: {error}"
    return ""


def check_types(path: Path, graph: Graph) -> None:
    """Have ONNX Runtime read a graph's file that it has no kernels for here. Raises ArtifactError where it finds more amiss than that."""
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    try:
        Session(path, signature=graph.signature, disabled_optimizers=fatal_optimizers(graph.model))
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
        self.input_names = inner.input_names

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Answer one batch."""
        batch = len(next(iter(feeds.values())))
        rows = [{name: array[row : row + 1] for name, array in feeds.items()} for row in range(batch)]
        answers = [self._inner.run(row) for row in rows]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}


def _is_quantized(graph: Graph) -> bool:
    """Whether a graph has numbers of 8 bits and fewer: kernels for them are slow, or round otherwise, without packed weights."""
    constants = [value.const_value for inner in graph.model.graphs() for value in inner.initializers.values()]
    constants += [
        attribute.as_tensor()
        for node in graph.model.graph.all_nodes()
        if node.op_type == "Constant" and (attribute := node.attributes.get("value")) is not None
    ]
    return any(
        constant is not None and constant.dtype not in _NO_NUMBERS and constant.dtype.bitwidth <= 8
        for constant in constants
    )


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
