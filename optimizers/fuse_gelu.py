"""One Gelu operator for its spelled-out forms, whatever the order of operands and wherever the factor 0.5 stands.

    x * 0.5 * (1 + Erf(x / √2))                              →   Gelu(x), approximate="none"
    x * 0.5 * (1 + Tanh(√(2/π) * (x + 0.044715 * x³)))       →   Gelu(x), approximate="tanh"

Reads the argument of Erf or Tanh as a polynomial in x, so that any arrangement of Add, Mul, Div and Pow is the
same; its coefficients must be those above to one part in a thousand. Gelu is an operator since opset 20.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.coverage import Miss, coverage
from onnxpress.optimizers.edits import insert, replace_value
from onnxpress.optimizers.matching import body_nodes, close, only_user, operands, produced_by, scalar
from onnxpress.optimizers.opset import refused_opset

Polynomial = dict[int, float]  # power of x → coefficient

_OPSET = 20
_TANH = math.sqrt(2 / math.pi)
_ARGUMENTS: dict[str, Polynomial] = {"Erf": {1: 1 / math.sqrt(2)}, "Tanh": {1: _TANH, 3: 0.044715 * _TANH}}
_APPROXIMATE = {"Erf": "none", "Tanh": "tanh"}
_FACTORS = 2  # products that bring 0.5 and x to 1 + Erf(…)
_DEEPEST = 8  # nodes from an argument down to x; the longest known spelling takes 5


@dataclass(frozen=True, kw_only=True)
class FuseGelu:
    """No options."""

    name: ClassVar[str] = "fuse-gelu"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Fuse. `changes` counts the Gelu operators made."""
        matches, misses = _find(graph)
        if matches:
            if refused := refused_opset(graph, _OPSET):
                return PassResult(graph=graph, changes=0, notes=refused)
            matches, misses = _find(graph)
        for match in matches:
            gelu = insert(
                match.last,
                "Gelu",
                [match.x],
                {"approximate": _APPROXIMATE[match.activation.op_type]},
                name=f"{match.activation.outputs[0].name}_gelu",
                dtype=match.output.dtype,
                shape=match.output.shape,
            )
            replace_value(graph, match.output, gelu)
        if matches:
            RemoveUnusedNodesPass()(graph.model)
        notes = coverage(len(matches), misses, what="Erf or Tanh + 1", into="Gelu")
        return PassResult(graph=graph, changes=len(matches), notes=notes)


@dataclass(frozen=True, kw_only=True)
class _Match:
    x: ir.Value
    activation: ir.Node
    last: ir.Node

    @property
    def output(self) -> ir.Value:
        return self.last.outputs[0]


def _find(graph: Graph) -> tuple[list[_Match], list[Miss]]:
    matches, misses = [], []
    for activation in body_nodes(graph, "Erf", "Tanh"):
        plus_one = only_user(activation.outputs[0], "Add")
        split = None if plus_one is None else operands(plus_one)
        if plus_one is None or split is None or not close(split[1], 1.0):
            continue
        found = _match(activation, plus_one)
        if isinstance(found, Miss):
            misses.append(found)
        else:
            matches.append(found)
    return matches, misses


def _match(activation: ir.Node, plus_one: ir.Node) -> _Match | Miss:
    """Follow the products above 1 + Erf(…) until they amount to 0.5 * x, then read the argument."""
    factors: list[tuple[ir.Value, bool]] = []  # the other operand of each product, and whether it divides
    last = plus_one
    x = None
    while x is None:
        product = only_user(last.outputs[0], "Mul", "Div")
        if product is None or len(factors) == _FACTORS:
            return Miss(node=activation, reason="the products around it do not amount to 0.5 * x", steps=1)
        divides = product.op_type == "Div"
        other = product.inputs[1] if product.inputs[0] is last.outputs[0] else product.inputs[0]
        if other is None or (divides and other is product.inputs[0]):
            return Miss(node=activation, reason="it stands in a divisor", steps=1)
        factors.append((other, divides))
        last = product
        x = next((value for value in _candidates(factors) if _is_half(factors, value)), None)
    argument = _polynomial(activation.inputs[0], x)
    wanted = _ARGUMENTS[activation.op_type]
    if argument is None or set(argument) != set(wanted):
        return Miss(node=activation, reason="its argument is not Gelu's polynomial in x", steps=2)
    if not all(close(argument[power], wanted[power]) for power in wanted):
        return Miss(node=activation, reason=f"its argument's coefficients are {argument}, not {wanted}", steps=3)
    return _Match(x=x, activation=activation, last=last)


def _candidates(factors: list[tuple[ir.Value, bool]]) -> Iterator[ir.Value]:
    """What x may be: a factor, or a factor without the constant that it is multiplied or divided by."""
    for factor, divides in factors:
        if divides or scalar(factor) is not None:
            continue
        yield factor
        node = produced_by(factor, "Mul", "Div")
        if node is not None:
            yield from (value for value in node.inputs if value is not None and scalar(value) is None)


def _is_half(factors: list[tuple[ir.Value, bool]], x: ir.Value) -> bool:
    total: Polynomial = {0: 1.0}
    for factor, divides in factors:
        number = scalar(factor)
        polynomial = _polynomial(factor, x)
        if divides:
            polynomial = {0: 1 / number} if number else None
        if polynomial is None:
            return False
        total = _times(total, polynomial)
    return set(total) == {1} and close(total[1], 0.5)


def _polynomial(value: ir.Value | None, x: ir.Value, depth: int = 0) -> Polynomial | None:
    """A value as a polynomial in x, or None where it is something else."""
    if value is x:
        return {1: 1.0}
    number = scalar(value)
    if number is not None:
        return {0: number}
    node = produced_by(value, "Add", "Mul", "Div", "Pow")
    if node is None or depth == _DEEPEST:
        return None
    first = _polynomial(node.inputs[0], x, depth + 1)
    if first is None:
        return None
    if node.op_type in ("Div", "Pow"):
        number = scalar(node.inputs[1])
        if node.op_type == "Div":
            return {power: coefficient / number for power, coefficient in first.items()} if number else None
        if number not in (2.0, 3.0):
            return None
        square = _times(first, first)
        return square if number == 2.0 else _times(square, first)
    second = _polynomial(node.inputs[1], x, depth + 1)
    if second is None:
        return None
    return _times(first, second) if node.op_type == "Mul" else _plus(first, second)


def _plus(first: Polynomial, second: Polynomial) -> Polynomial:
    total: defaultdict[int, float] = defaultdict(float, first)
    for power, coefficient in second.items():
        total[power] += coefficient
    return dict(total)


def _times(first: Polynomial, second: Polynomial) -> Polynomial:
    total: defaultdict[int, float] = defaultdict(float)
    for power, coefficient in first.items():
        for other, factor in second.items():
            total[power + other] += coefficient * factor
    return dict(total)
