"""2:4 sparsity: of every four weights along a linear layer's input, two are zero. Shapes stay; NVIDIA's sparse tensor cores skip zeros.

    [0.3, -0.1, 0.7, 0.05]   →   [0.31, 0, 0.72, 0]

Which two go, and what the others make up for, follows from the second moments of the layer's inputs, behind layers that are sparse
already (SparseGPT, arXiv 2301.00774). Only for targets whose kernels use it: elsewhere a zero costs as much as any number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.edits import replace_constant
from onnxpress.optimizers.error_feedback import error_spread
from onnxpress.optimizers.linear import linears
from onnxpress.optimizers.rounding import Float
from onnxpress.optimizers.targets import Target

_STRIP = 128  # inputs after which all later weights are updated at once
_GROUP, _ZEROS = 4, 2


@dataclass(frozen=True, kw_only=True)
class Sparse24:
    """2:4 sparse linear layers. minimum_elements: weights smaller than this stay dense."""

    name: ClassVar[str] = "sparse-2-4"
    lossless: ClassVar[bool] = False

    minimum_elements: int = 1024

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Make every linear layer sparse but those in `context.keep` and those whose width no four divide.

        Raises RecipeError for targets without sparse kernels, and without calibration data.
        """
        check_sparse_target(context.target)
        if context.stream is None:
            raise RecipeError("The pass sparse-2-4 needs calibration inputs, and none are at hand.")
        stream = context.stream(graph)
        touched: list[str] = []
        moments: tuple[str, Float] | None = None
        for layer in list(linears(graph)):
            weight = layer.weight_array().T  # (out, in)
            node = layer.product
            read = node.inputs[1]
            assert read is not None
            shared = len(layer.weight.uses()) > 1 or len(read.uses()) > 1
            if layer.name in context.keep or shared or weight.size < self.minimum_elements or weight.shape[1] % _GROUP:
                continue
            context.progress(f"sparse: {layer.name}")
            name = str(layer.x.name)
            if moments is None or moments[0] != name:
                moments = (name, stream.second_moments(layer.x))
            sparse = two_of_four(weight, moments[1])
            assert is_two_of_four(sparse)
            transposed = layer.transposed and read is layer.weight  # else a Transpose stands between, and goes
            replace_constant(graph, node, 1, sparse if transposed else sparse.T)
            touched.append(layer.name)
        RemoveUnusedNodesPass()(graph.model)
        notes = (f"{len(touched)} linear layers, two of four weights along the inputs are zero",)
        return PassResult(graph=graph, changes=len(touched), notes=notes, touched=tuple(touched), kept_as="dense")


def check_sparse_target(target: Target) -> None:
    """Raises RecipeError for targets without sparse kernels."""
    if "tensorrt" not in target.providers:
        raise RecipeError(
            f"The pass sparse-2-4 brings nothing on the target {target.name}: its kernels multiply zeros like any "
            "other number. Choose --target tensorrt, or make shapes smaller with --prune."
        )


def two_of_four(weight: Float, moments: Float) -> Float:
    """A weight (out, in) of which two of four neighbouring inputs' numbers are zero. moments: (in, in), the inputs' mean x xᵀ."""
    columns = weight.shape[1]
    spread = error_spread(moments)
    rest = weight.T.astype(np.float32)  # (in, out)
    for start in range(0, columns, _STRIP):
        end = min(start + _STRIP, columns)
        errors = np.zeros((end - start, len(weight)), np.float32)
        for group in range(start, end, _GROUP):
            places = np.arange(group, group + _GROUP)
            loss = (rest[places] / spread[places, places][:, None]) ** 2
            gone = np.argsort(np.argsort(loss, axis=0, kind="stable"), axis=0) < _ZEROS
            for index, place in enumerate(places):
                error = np.where(gone[index], rest[place], 0) / spread[place, place]
                rest[place] = np.where(gone[index], 0, rest[place])
                rest[place + 1 : end] -= np.outer(spread[place, place + 1 : end], error)
                errors[place - start] = error
        rest[end:] -= spread[start:end, end:].T @ errors
    return np.ascontiguousarray(rest.T)


def is_two_of_four(weight: Float) -> bool:
    """Whether at least two of every four neighbouring numbers in the rows of a weight (out, in) are zero."""
    return bool(((weight.reshape(len(weight), -1, _GROUP) == 0).sum(axis=2) >= _ZEROS).all())
