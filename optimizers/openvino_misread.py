"""Says which layers of integers OpenVINO would misread, so that they stay in float.

OpenVINO 2026.4 on a CPU, onnxruntime-ep-openvino 1.8.1, answers by other numbers, and says nothing, where what a layer of integers reads was
multiplied by negative numbers of each channel, or is a maximum; and in others (`misread`). What can be spelled so that it is read right is not
said here: openvino_forms.py spells it.

Found by random graphs beside the CPU provider without its optimizers (benchmarks/random_graphs.py), and by variations of them;
tests/optimizers/test_openvino_forms.py has one of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.optimizers.dependencies import ELEMENTWISE
from onnxpress.optimizers.fuse_convolutions import normalization
from onnxpress.optimizers.matching import attribute, constant, optional, produced_by, rank

REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
              "ReduceLogSumExp", "ReduceSumSquare")  # fmt: skip
AXES = 4  # of images: over fewer, reductions are misread
_SUMS = ("ReduceMean", "ReduceSum")
_EXTREMES = frozenset({"GlobalMaxPool", *REDUCTIONS}) - frozenset(_SUMS)
# Operators over which factors are carried.
_CARRYING = frozenset({
    "AveragePool", "Clip", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GlobalAveragePool", "Identity",
    "LeakyRelu", "MaxPool", "Pad", "Relu", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", *_SUMS,
})  # fmt: skip
_REARRANGING = frozenset({"Flatten", "Gather", "Reshape", "Squeeze", "Unsqueeze"})
_SUM, _NARROW_MEAN, _FUNCTION = "a sum", "a mean over fewer than four axes", "a function"
_POSITIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax"})
_SMALL_GROUP, _LARGE_GROUP = 16, 32  # channels
_CARRIED_WRONGLY = frozenset({"Gather", _NARROW_MEAN})


def misread(value: ir.Value, layer: ir.Node | None = None) -> str:
    """Why OpenVINO would misread a value that is quantized, or what a layer of integers makes of it; or nothing.

    OpenVINO moves multiplications and additions past the operators behind them, up to the next quantization, and there it goes wrong.
    Tried operator by operator with a convolution or matrix product behind; a norm of the last of three axes and what comes after it
    are read right.
    """
    return ("" if layer is None else _misread_layer(value, layer)) or _misread_value(value)


def _misread_layer(x: ir.Value, node: ir.Node) -> str:
    weight = node.inputs[1]
    if node.op_type not in ("Conv", "ConvTranspose") or weight is None or weight.shape is None:
        return ""
    channels, others, *_ = weight.shape.numpy()  # of a Conv: out, in of a group; of a ConvTranspose: in, out
    if node.op_type == "ConvTranspose":
        return "ConvTranspose of input channels that are no multiple of 4" if channels % 4 else ""
    groups = attribute(node, "group", 1)
    small = max(channels // groups, others) <= _SMALL_GROUP or others >= _LARGE_GROUP
    if groups > 1 and not small and is_padded(node) and not _is_positive(x):
        return "Conv of padded groups that reads negative numbers"
    return ""


def is_padded(node: ir.Node) -> bool:
    """Whether a convolution or a pooling pads, as far as the graph says it."""
    return any(attribute(node, "pads", [])) or attribute(node, "auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")


def _is_positive(value: ir.Value | None) -> bool:
    """Whether nothing in a value is below zero, so that zero is its smallest code."""
    node = None if value is None else value.producer()
    if node is None:
        return False
    if node.op_type == "Clip":
        low = constant(optional(node, 1))
        return low is not None and bool((low >= 0).all())
    if node.op_type == "Concat":
        return all(map(_is_positive, node.inputs))
    return node.op_type in _POSITIVE or (node.op_type in _CARRYING - {"Pad", "Resize"} and _is_positive(node.inputs[0]))


def _misread_value(value: ir.Value) -> str:
    waiting: list[tuple[ir.Value, frozenset[str]]] = [(value, frozenset())]  # …, and what is between it and the layer
    seen = set()
    while waiting:
        value, between = waiting.pop()
        node = value.producer()
        if node is None or node.domain != "" or (value, between) in seen:
            continue
        seen.add((value, between))
        factor, adds = _factor(node), _adds(node)
        if node.op_type in _EXTREMES:
            return node.op_type  # also where functions of it are rounded, for which OpenVINO rounds too early
        if _FUNCTION in between or (factor is None and not adds and node.op_type in ELEMENTWISE - _CARRYING):
            if node.op_type in ELEMENTWISE | _CARRYING and (argument := _argument(node)) is not None:
                waiting.append((argument, between | {_FUNCTION}))
            continue
        if node.op_type == "AveragePool" and attribute(node, "count_include_pad", 0) and is_padded(node):
            return "AveragePool that counts its padding"
        if node.op_type == "Concat" and rank(node.outputs[0]) == 3:
            return "Concat of three axes"  # it fails to compile
        exposed = not (adds or _SUM in between) or between & _REARRANGING
        if factor is not None and exposed and (factor < 0).any() and not _is_of_last_axis(node, factor):
            return f"{node.op_type} by negative numbers"
        if (factor is not None or adds) and (carried := between & _CARRIED_WRONGLY):
            return f"{node.op_type} before {min(carried)}"
        if factor is None and not adds and node.op_type not in _CARRYING:
            continue
        between |= {_SUM if adds else node.op_type}
        if node.op_type in _SUMS and (rank(node.inputs[0]) or 0) < AXES:
            between |= {_NARROW_MEAN}
        sources = node.inputs if node.op_type in ("Concat", "Mul", "Add", "Sub") else node.inputs[:1]
        waiting += [(source, between) for source in sources if source is not None]
    return ""


def _argument(node: ir.Node) -> ir.Value | None:
    """Of what a node is a function, if of one value alone, however it is spelled: Mul(x, Sigmoid(x)) is one of x."""

    def read(of: ir.Node) -> set[ir.Value]:
        return {value for value in of.inputs if value is not None and constant(value) is None}

    values, seen = read(node), set[ir.Value]()
    while len(values) > 1:
        value = next((value for value in values if produced_by(value, *ELEMENTWISE)), None)
        producer = None if value is None else value.producer()
        if value is None or producer is None:
            return None
        seen.add(value)
        values = (values | read(producer)) - seen
    return next(iter(values), None)


def _factor(node: ir.Node) -> npt.NDArray[Any] | None:
    """What a node multiplies its input by, where that is fixed."""
    if node.op_type == "Neg" or (node.op_type == "Sub" and constant(node.inputs[0]) is not None):
        return np.array(-1.0)
    if node.op_type == "BatchNormalization":
        found = normalization(node)
        return None if found is None else found[0]
    places = {"Mul": node.inputs, "Div": node.inputs[1:]}.get(node.op_type, ())
    return next((array for value in places if (array := constant(value)) is not None), None)


def _adds(node: ir.Node) -> bool:
    if node.op_type == "BatchNormalization":
        return normalization(node) is not None
    return node.op_type in ("Add", "Sub") and any(constant(value) is not None for value in node.inputs)


def _is_of_last_axis(node: ir.Node, factor: npt.NDArray[Any]) -> bool:
    """Of three axes, as transformers have them."""
    return (
        node.op_type != "BatchNormalization"
        and rank(node.outputs[0]) == 3
        and factor.size == (factor.shape or (1,))[-1]
    )
