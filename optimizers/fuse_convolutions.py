"""What is linear behind or beside a convolution goes into its weights, zeros around what it reads into its padding.

    Conv(x, w, b) · s, + s, − s, / s, with a number a channel   →   Conv(x, w · s, b · s)
    MatMul(x, w) + b · s, / s, with a number a feature          →   MatMul(x, w · s) + b · s; Gemm too
    Conv(x, w, b) ± Conv(x, v, c), around the same centres      →   Conv(x, w ± v, b ± c)
    Conv(x, w, b) ± BatchNormalization(x), or ± x               →   the same, where each channel is convolved by itself
    Conv(Pad(x), w)                                             →   Conv(x, w) with more padding

The branches are those of RepVGG, MobileOne and FastViT ("structural re-parameterization": Ding et al. 2021, "RepVGG: Making VGG-style
ConvNets Great Again", section 3.3), and of RT-DETR's layers, which PyTorch's models keep apart.

A batch norm behind a convolution is fold's. Deliberately leaves x and its norm beside a convolution over several channels: one weight of 1
among hundreds of small ones takes 8 bits away from them. And factors that would make weights too small for float16's fractions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.edits import (
    add_constant,
    drop_unused_constants,
    replace_constant,
    replace_node,
    replace_value,
    set_input,
)
from onnxpress.optimizers.linear import linears
from onnxpress.optimizers.matching import (
    attribute,
    body_nodes,
    constant,
    dimension,
    only_user,
    optional,
    produced_by,
    rank,
)

_Array = npt.NDArray[np.float64]
_SMALL, _LARGE = 2.0**-10, 2.0**15  # float16's fractions are whole from 2^-14 on, its numbers end at 2^16


@dataclass(frozen=True, kw_only=True)
class FuseConvolutions:
    """No options."""

    name: ClassVar[str] = "fuse-convolutions"
    lossless: ClassVar[bool] = True

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Fuse. `changes` counts what went into a convolution or linear layer."""
        padded = sum(_take_padding(node) for node in body_nodes(graph, "Conv"))
        RemoveUnusedNodesPass()(graph.model)
        scaled = sum(_scale_convolution(graph, node) for node in body_nodes(graph, "Conv")) + _scale_linears(graph)
        merged = sum(_merge(graph, node) for node in body_nodes(graph, "Add", "Sub"))
        drop_unused_constants(graph)
        notes = (f"{merged} branches beside convolutions went into their weights",) if merged else ()
        return PassResult(graph=graph, changes=padded + scaled + merged, notes=notes)


def _take_padding(node: ir.Node) -> int:
    """Read what is inside of zeros, and pad by as much."""
    pad, axes = produced_by(node.inputs[0], "Pad"), rank(node.inputs[1])
    if pad is None or axes is None or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return 0
    around, value = pad_amounts(pad, axes), optional(pad, 2)
    number = None if value is None else constant(value)
    is_zero = value is None or (number is not None and not number.any())
    if around is None or not is_zero or attribute(pad, "mode", "constant") != "constant":
        return 0
    if around[:, :2].any() or (around < 0).any():
        return 0
    before = np.array(attribute(node, "pads", (0,) * (2 * (axes - 2)))).reshape(2, -1)
    node.attributes["pads"] = ir.AttrInt64s("pads", (before + around[:, 2:]).reshape(-1).tolist())
    node.replace_input_with(0, pad.inputs[0])
    return 1


def pad_amounts(node: ir.Node, axes: int) -> npt.NDArray[np.int64] | None:
    """What a Pad puts before and behind each of the axes, (2, axes); None where that is computed, or an attribute (before opset 11)."""
    named = optional(node, 3)
    amounts = constant(optional(node, 1))
    places = np.arange(axes) if named is None else constant(named)
    if amounts is None or places is None:
        return None
    around = np.zeros((2, axes), np.int64)
    around[:, places % axes] = amounts.reshape(2, -1)
    return around


def _scale_convolution(graph: Graph, node: ir.Node) -> int:
    """Take constants behind a convolution into it, as many as follow each other."""
    count = 0
    while (user := only_user(node.outputs[0], "Mul", "Div", "Add", "Sub")) is not None:
        first = user.inputs[0] is node.outputs[0]
        if constant(user.inputs[1 if first else 0]) is None:
            break  # before weights are read
        weight, bias = _weights(node)
        if weight is None or bias is None:
            break
        numbers = _a_channel(user.inputs[1 if first else 0], len(weight), axes=weight.ndim, behind=weight.ndim - 2)
        if numbers is None or (user.op_type == "Div" and not (first and np.all(numbers))):
            break
        if user.op_type in ("Mul", "Div"):
            factors = numbers if user.op_type == "Mul" else 1 / numbers
            if not _fits(np.abs(weight).reshape(len(weight), -1).max(axis=1, initial=0), factors):
                break
            weight, bias = weight * factors.reshape(-1, *[1] * (weight.ndim - 1)), bias * factors
        elif user.op_type == "Add":
            bias = bias + numbers
        else:
            sign = 1 if first else -1
            weight, bias = sign * weight, sign * (bias - numbers)
        _write(graph, node, weight, bias)
        _stand_for(graph, node, user)
        count += 1
    return count


def _scale_linears(graph: Graph) -> int:
    """Take factors of output features (layer scales) into the weights of MatMul and Gemm. One factor for all of them stays: language
    models have such, and copies of their weights would cost more than they bring.
    """
    count = 0
    for linear in list(linears(graph)):
        user = only_user(linear.output, "Mul", "Div")
        width = dimension(linear.weight, 0 if linear.transposed else 1)
        if user is None or constant(linear.weight) is None or not isinstance(width, int):
            continue
        first = user.inputs[0] is linear.output
        other = user.inputs[1 if first else 0]
        numbers = _a_channel(other, width, axes=rank(linear.output) or 1, behind=0)
        one = other is not None and other.const_value is not None and other.const_value.size == 1
        if numbers is None or one or (user.op_type == "Div" and not (first and np.all(numbers))):
            continue
        readers = [use.node for use in linear.weight.uses()]
        bias = None if linear.bias is None else constant(linear.bias)
        if len(readers) != 1 or readers[0] not in linear.nodes or (bias is None) != (linear.bias is None):
            continue  # a Transpose of the weight that others read is none of the layer's nodes
        factors = (numbers if user.op_type == "Mul" else 1 / numbers).astype(np.float32)
        weight = linear.weight_array()
        if not _fits(np.abs(weight).max(axis=0, initial=0), factors):
            continue
        scaled = weight * factors
        place = next(index for index, value in enumerate(readers[0].inputs) if value is linear.weight)
        replace_constant(graph, readers[0], place, scaled.T if linear.transposed else scaled)
        if bias is not None:
            last = linear.nodes[-1]
            place = next(index for index, value in enumerate(last.inputs) if value is linear.bias)
            replace_constant(graph, last, place, bias * factors)
        _stand_for(graph, linear.nodes[-1], user)
        count += 1
    return count


@dataclass(frozen=True, kw_only=True)
class _Branch:
    """A convolution of x. weight: (channels, channels a group, *kernel). begin, end: padding of each axis."""

    x: ir.Value
    weight: _Array
    bias: _Array
    group: int
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]


def _merge(graph: Graph, total: ir.Node) -> int:
    """One convolution in the place of a sum or difference of two branches over the same input."""
    first, second = total.inputs[0], total.inputs[1]
    if first is None or second is None or first is second or not _are_beside(first, second):
        return 0
    branches = [_convolution(first, total), _convolution(second, total)]
    for index, value in enumerate((first, second)):
        other = branches[1 - index]
        if branches[index] is None and other is not None:
            branches[index] = _by_channel(value, other, total)
    one, two = branches
    if one is None or two is None or one.x is not two.x or (one.group, one.strides) != (two.group, two.strides):
        return 0
    sign = 1 if total.op_type == "Add" else -1
    two = dataclasses.replace(two, weight=sign * two.weight, bias=sign * two.bias)
    wide, narrow = (one, two) if one.weight.size >= two.weight.size else (two, one)
    weight = _added(wide, narrow)
    if weight is None:
        return 0
    node = ir.node(
        "Conv",
        [
            wide.x,
            add_constant(graph, f"{total.outputs[0].name}_weight", weight.astype(np.float32)),
            add_constant(graph, f"{total.outputs[0].name}_bias", (wide.bias + narrow.bias).astype(np.float32)),
        ],
        {
            "group": wide.group,
            "strides": wide.strides,
            "dilations": wide.dilations,
            "pads": (*wide.begin, *wide.end),
            "kernel_shape": weight.shape[2:],
        },
        name=total.name or f"{total.outputs[0].name}_convolution",
    )
    replace_node(graph, total, node)
    for value in (first, second):
        producer = value.producer()
        if value is not wide.x and producer is not None:
            graph.model.graph.remove(producer, safe=True)
    return 1


def _are_beside(first: ir.Value, second: ir.Value) -> bool:
    """Whether both read one value, or one is what the other reads; asked before weights are read."""
    read = [
        value if node is None or node.op_type not in ("Conv", "BatchNormalization") else node.inputs[0]
        for value, node in ((first, first.producer()), (second, second.producer()))
    ]
    return read[0] is second or read[1] is first or read[0] is read[1]


def _convolution(value: ir.Value, total: ir.Node) -> _Branch | None:
    """The convolution that gives a value for this sum alone."""
    node = value.producer()
    if node is None or only_user(value, total.op_type) is not total or node.op_type != "Conv" or node.domain != "":
        return None
    x, (weight, bias) = node.inputs[0], _weights(node)
    if weight is None or bias is None or x is None or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return None
    axes = weight.ndim - 2
    pads = tuple(attribute(node, "pads", (0,) * (2 * axes)))
    return _Branch(
        x=x,
        weight=weight,
        bias=bias,
        group=attribute(node, "group", 1),
        strides=tuple(attribute(node, "strides", (1,) * axes)),
        dilations=tuple(attribute(node, "dilations", (1,) * axes)),
        begin=pads[:axes],
        end=pads[axes:],
    )


def _by_channel(value: ir.Value, beside: _Branch, total: ir.Node) -> _Branch | None:
    """x itself or its batch norm, as a convolution like the one beside it."""
    channels, axes = len(beside.weight), beside.weight.ndim - 2
    if beside.group != channels or beside.weight.shape[1] != 1 or set(beside.strides) != {1}:
        return None
    if value is beside.x:
        scale, shift = np.ones(channels), np.zeros(channels)
    else:
        node = value.producer()
        if node is None or only_user(value, total.op_type) is not total or node.inputs[0] is not beside.x:
            return None
        norm = normalization(node)
        if norm is None:
            return None
        scale, shift = norm
    return _Branch(
        x=beside.x,
        weight=scale.reshape(-1, *[1] * (axes + 1)),
        bias=shift,
        group=channels,
        strides=(1,) * axes,
        dilations=(1,) * axes,
        begin=(0,) * axes,
        end=(0,) * axes,
    )


def normalization(node: ir.Node) -> tuple[_Array, _Array] | None:
    """Factor and summand of each channel of a BatchNormalization with constants, as it is where nothing is trained."""
    if node.op_type != "BatchNormalization" or node.domain != "" or attribute(node, "training_mode", 0):
        return None
    if not attribute(node, "spatial", 1):
        return None  # before opset 9: a number of its own for each place
    found = [_own(value) for value in node.inputs[1:]]
    scale, shift, mean, variance = (found + [None] * 4)[:4]
    if scale is None or shift is None or mean is None or variance is None or len(node.outputs) != 1:
        return None
    factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    return factor, shift - mean * factor


def _added(wide: _Branch, narrow: _Branch) -> _Array | None:
    """The wide branch's weights with the narrow one's at their places; None where their places are not the same."""
    if wide.weight.shape[:2] != narrow.weight.shape[:2]:
        return None
    places: list[slice] = []
    for axis, (size, small) in enumerate(zip(wide.weight.shape[2:], narrow.weight.shape[2:], strict=True)):
        step, small_step = wide.dilations[axis], narrow.dilations[axis]
        ahead = wide.begin[axis] - narrow.begin[axis]
        behind = wide.end[axis] - narrow.end[axis]
        spare = step * (size - 1) - small_step * (small - 1)
        if ahead < 0 or behind < 0 or ahead + behind != spare or ahead % step or (small > 1 and small_step != step):
            return None
        places.append(slice(ahead // step, ahead // step + small))
    weight = wide.weight.copy()
    weight[(slice(None), slice(None), *places)] += narrow.weight
    return weight


def _weights(node: ir.Node) -> tuple[_Array | None, _Array | None]:
    """float64 weights and biases of a convolution, where they are float32 constants; the weights others must not read."""
    value, bias = node.inputs[1], optional(node, 2)
    weight = None if value is None or len(value.uses()) != 1 else _own(value)
    return weight, _own(bias) if bias is not None or weight is None else np.zeros(len(weight))


def _fits(largest: npt.NDArray[np.floating[Any]], factors: npt.NDArray[np.floating[Any]]) -> bool:
    """Whether each channel's largest weight stays where float16 has all of its fraction, and smaller ones beside it too."""
    scaled = largest.astype(np.float64) * np.abs(factors)
    return bool(np.all(scaled >= np.minimum(largest, _SMALL)) and np.all(scaled < _LARGE))


def _own(value: ir.Value | None) -> _Array | None:
    array = constant(value)
    return None if array is None or array.dtype != np.float32 else array.astype(np.float64)


def _a_channel(value: ir.Value | None, channels: int, *, axes: int, behind: int) -> _Array | None:
    """A constant's numbers, one a channel, where it is the same along all other of the `axes`, of which `behind` follow the channels."""
    array = _own(value)
    if array is None or array.ndim > axes or array.size not in (1, channels) or not np.isfinite(array).all():
        return None
    if array.size > 1 and (array.ndim <= behind or array.shape[array.ndim - 1 - behind] != channels):
        return None
    return np.broadcast_to(array.reshape(-1), (channels,))


def _write(graph: Graph, node: ir.Node, weight: _Array, bias: _Array) -> None:
    replace_constant(graph, node, 1, weight.astype(np.float32))
    if optional(node, 2) is not None:
        replace_constant(graph, node, 2, bias.astype(np.float32))
    elif bias.any():
        set_input(node, 2, add_constant(graph, f"{node.outputs[0].name}_bias", bias.astype(np.float32)))


def _stand_for(graph: Graph, node: ir.Node, user: ir.Node) -> None:
    """Let what a node gives take the place of what its reader gave."""
    given, wanted = node.outputs[0], user.outputs[0]
    given.shape, given.type = given.shape or wanted.shape, given.type or wanted.type
    replace_value(graph, wanted, given)
    graph.model.graph.remove(user, safe=True)
