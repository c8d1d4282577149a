"""One normalization operator for its spelled-out forms.

    d = x - mean(x);  d / Sqrt(mean(d²) + epsilon) * gamma + beta   →   LayerNormalization(x, gamma, beta)
    x / Sqrt(mean(x²) + epsilon) * weight                           →   RMSNormalization(x, weight)

The means are over the last axis, gamma, beta and weight are one-dimensional constants of its size. LayerNormalization
is an operator since opset 17, RMSNormalization since 23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.coverage import Miss, coverage
from onnxpress.optimizers.edits import insert, replace_value
from onnxpress.optimizers.matching import (
    body_nodes,
    constant,
    dimension,
    only_user,
    operands,
    produced_by,
    reduces_last_axis,
    scalar,
)
from onnxpress.optimizers.opset import refused_opset

_OPSET = {"LayerNormalization": 17, "RMSNormalization": 23}


@dataclass(frozen=True, kw_only=True)
class FuseLayerNorm:
    """No options."""

    name: ClassVar[str] = "fuse-layer-norm"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Fuse. `changes` counts the normalization operators made."""
        matches, misses = _find(graph)
        if matches:
            if refused := refused_opset(graph, max(_OPSET[match.op_type] for match in matches)):
                return PassResult(graph=graph, changes=0, notes=refused)
            matches, misses = _find(graph)
        for match in matches:
            output = match.last.outputs[0]
            fused = insert(
                match.last,
                match.op_type,
                [match.x, match.scale] + ([match.bias] if match.bias is not None else []),
                {"axis": -1, "epsilon": match.epsilon},
                name=f"{output.name}_norm",
                dtype=output.dtype,
                shape=output.shape,
            )
            replace_value(graph, output, fused)
        if matches:
            RemoveUnusedNodesPass()(graph.model)
        kinds = " and ".join(sorted({match.op_type for match in matches})) or "LayerNormalization"
        notes = coverage(len(matches), misses, what="normalizations", into=kinds)
        return PassResult(graph=graph, changes=len(matches), notes=notes)


@dataclass(frozen=True, kw_only=True)
class _Match:
    op_type: str
    x: ir.Value
    scale: ir.Value
    bias: ir.Value | None
    epsilon: float
    last: ir.Node


def _find(graph: Graph) -> tuple[list[_Match], list[Miss]]:
    """Start from every mean of squares to which a constant is added."""
    matches, misses = [], []
    for mean in body_nodes(graph, "ReduceMean"):
        squared = _square_of(mean.inputs[0])
        add = only_user(mean.outputs[0], "Add")
        split = None if add is None else operands(add)
        if squared is None or add is None or split is None:
            continue
        found = _match(mean, squared, add, split[1])
        if isinstance(found, Miss):
            misses.append(found)
        else:
            matches.append(found)
    return matches, misses


def _match(mean: ir.Node, squared: ir.Value, add: ir.Node, epsilon: float) -> _Match | Miss:
    if not reduces_last_axis(mean):
        return Miss(node=mean, reason="its mean is not over the last axis alone")
    if epsilon < 0:
        return Miss(node=mean, reason=f"its epsilon is {epsilon}", steps=1)
    normalized = _divided_by_root(add.outputs[0], squared)
    if normalized is None:
        return Miss(node=mean, reason="nothing is divided by the square root of its mean of squares", steps=2)
    x = _centred(squared)
    width = dimension(squared, -1)
    multiply = only_user(normalized.outputs[0], "Mul")
    scale = None if multiply is None else _vector(multiply, normalized.outputs[0], width)
    if multiply is None or scale is None:
        return Miss(node=mean, reason=f"no multiplication by a constant of shape ({width},) follows", steps=3)
    if x is None:
        return _Match(op_type="RMSNormalization", x=squared, scale=scale, bias=None, epsilon=epsilon, last=multiply)
    last, bias = multiply, None
    plus = only_user(multiply.outputs[0], "Add")
    if plus is not None:
        bias = _vector(plus, multiply.outputs[0], width)
        last = last if bias is None else plus
    return _Match(op_type="LayerNormalization", x=x, scale=scale, bias=bias, epsilon=epsilon, last=last)


def _square_of(value: ir.Value | None) -> ir.Value | None:
    """v where the value is v * v or v ** 2."""
    node = produced_by(value, "Mul", "Pow")
    if node is None:
        return None
    first, second = node.inputs[0], node.inputs[1]
    if node.op_type == "Mul":
        return first if first is second or _same_difference(first, second) else None
    return first if scalar(second) == 2.0 else None


def _centred(value: ir.Value) -> ir.Value | None:
    """x where the value is x - mean(x) over the last axis."""
    node = produced_by(value, "Sub")
    mean = None if node is None else produced_by(node.inputs[1], "ReduceMean")
    if node is None or mean is None or mean.inputs[0] is not node.inputs[0] or not reduces_last_axis(mean):
        return None
    return node.inputs[0]


def _same_difference(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether two values are the same x - mean(x), written twice (as some exporters do)."""
    if first is None or second is None:
        return False
    return first is second or (_centred(first) is not None and _centred(first) is _centred(second))


def _divided_by_root(variance: ir.Value, numerator: ir.Value) -> ir.Node | None:
    """The node that gives numerator / sqrt(variance), spelled Div, Reciprocal and Mul, or Pow -0.5 and Mul."""
    root = only_user(variance, "Sqrt", "Pow")
    if root is None or (
        root.op_type == "Pow" and (root.inputs[0] is not variance or scalar(root.inputs[1]) not in (0.5, -0.5))
    ):
        return None
    inverse = root.op_type == "Pow" and scalar(root.inputs[1]) == -0.5
    value = root.outputs[0]
    user = only_user(value, "Div", "Reciprocal", "Mul")
    if user is not None and not inverse:
        if user.op_type == "Div" and user.inputs[1] is value and _same_difference(user.inputs[0], numerator):
            return user
        if user.op_type == "Reciprocal" or (
            user.op_type == "Div" and scalar(user.inputs[0]) == 1.0 and user.inputs[1] is value
        ):
            inverse, value = True, user.outputs[0]
            user = only_user(value, "Mul")
    if user is None or not inverse or user.op_type != "Mul":
        return None
    other = user.inputs[1] if user.inputs[0] is value else user.inputs[0]
    return user if _same_difference(other, numerator) else None


def _vector(node: ir.Node, value: ir.Value, width: int | str | None) -> ir.Value | None:
    """The operand beside `value` where it is a constant of shape (width,)."""
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    array = constant(other)
    if array is None or not isinstance(width, int) or array.shape != (width,) or array.dtype == np.float64:
        return None
    return other
