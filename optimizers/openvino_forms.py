"""Spells what OpenVINO misreads as it reads it right, and says which layers it would misread on integers.

    ReduceMean(x), without the axes that it took   →   Squeeze(ReduceMean(x)), over an x of four axes or more; other reductions, too
    Gather(x), of one place on an axis             →   Squeeze(Slice(x))
    AveragePool(x), that counts its padding        →   AveragePool(Pad(x))
    Gelu(MaxPool(x)), and others                   →   Gelu(MaxPool(x) + b), with a b that is next to nothing
    Conv(x, w)                                     →   Conv(x, w, b), with such a b
    Conv(x, w), of groups with a long kernel       →   Conv(x, w), with a last tap of zeros

And what it reads right and runs slowly as it runs it fast

    x * s, s of a number a channel, (C, 1, 1)      →   x * s, (1, C, 1, 1): else x is put into another layout, and back
    GroupNormalization(x), of one group            →   LayerNormalization(x) * s + b, likewise
    small constants that several nodes read        →   one for each: else a layer's bias and what follows are nodes of their own
                                                       (beside integers alone)

OpenVINO 2026.4 on a CPU, onnxruntime-ep-openvino 1.8.1, answers by other numbers, and says nothing, where

- the mean over the last of three axes is added to, or multiplied by, numbers of each channel (in float32 too; a batch of one is right)
- the maximum over windows of what a convolution gives goes through a function that does not only rise (in float32 too): it is taken behind that
- a mean that counts its padding is taken of what was multiplied or added to by numbers of each channel, if anything in the graph is quantized
- one place on an axis is taken of what a matrix product of integers gives
- what a convolution of integers without a bias gives is read quantized and in float
- a convolution of groups, of few channels each, has a kernel so wide that both together fill whole rows of AMX (integers and bfloat16, on CPUs with AMX alone)

What no spelling mends is openvino_misread.py's. Found as said there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from onnxpress.errors import ConversionError
from onnxpress.graph import Graph
from onnxpress.optimizers.edits import add_constant, drop_unused_constants, insert, put_behind, replace_value, set_input
from onnxpress.optimizers.matching import (
    attribute,
    body_nodes,
    constant,
    name_of,
    optional,
    produced_by,
    rank,
    reduced_axes,
)
from onnxpress.optimizers.openvino_misread import AXES, REDUCTIONS
from onnxpress.optimizers.opset import raise_opset
from onnxpress.optimizers.shapes import infer_shapes

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_NOTHING = 1e-12  # OpenVINO drops a bias of zeros
_NOTHING_HALF = 1e-7  # about float16's smallest
_OPSET = 13  # the first whose Squeeze has its axes as an input
_ROW = 32  # numbers of bfloat16 in a row of AMX; of 8 bits it holds twice as many
_LARGEST_OWN = 8192  # numbers of a constant that is copied for each reader

_RISING = frozenset({
    "Add", "AveragePool", "BatchNormalization", "Concat", "Conv", "ConvTranspose", "GlobalAveragePool", "MaxPool", "Relu",
})  # fmt: skip


def respell(graph: Graph) -> tuple[str, ...]:
    """Change what is misread or slow in floats; says what was misread. Answers stay the same but for rounding."""
    _infer_shapes(graph)
    notes: tuple[str, ...] = ()
    reductions = 0
    if any(_axes(node) for node in body_nodes(graph, *REDUCTIONS)):
        try:
            raise_opset(graph, _OPSET)
            reductions = sum(_keep_axes(graph, node) for node in body_nodes(graph, *REDUCTIONS))
        except ConversionError as error:
            notes = (f"reductions stay as they are, and OpenVINO may misread them: {error}",)
    kernels = sum(_widen(graph, node) for node in body_nodes(graph, "Conv"))
    drop_unused_constants(graph)
    maxima = sum(_part(graph, node) for node in body_nodes(graph, "MaxPool"))
    for node in body_nodes(graph, "GroupNormalization"):
        _norm_over_layer(graph, node)
    wide: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in body_nodes(graph, "Add", "Sub", "Mul", "Div"):
        _name_all_axes(graph, node, wide)
    return _said({"reductions": reductions, "windows' maxima": maxima, "kernels of groups": kernels}) + notes


def respell_for_integers(graph: Graph) -> tuple[str, ...]:
    """Change what is misread beside integers, in a graph of opset 13 or later; as `respell`."""
    return _said(
        {
            "places taken": sum(_slice(graph, node) for node in body_nodes(graph, "Gather")),
            "padded means": sum(_pad_before(graph, node) for node in body_nodes(graph, "AveragePool")),
            "convolutions without a bias": sum(
                _give_bias(graph, node) for node in body_nodes(graph, "Conv", "ConvTranspose")
            ),
        }
    )


def _infer_shapes(graph: Graph) -> None:
    """Of a file that says none; ONNX's inference (1.23) does not know the norm's."""
    norms = body_nodes(graph, "GroupNormalization")
    while any(value.dtype is None for node in graph.model.graph for value in node.outputs):
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph.model)
        infer_shapes(graph.model)
        stuck = [(node.inputs[0], node.outputs[0]) for node in norms if node.outputs[0].dtype is None]
        known = [(x, output) for x, output in stuck if x is not None and x.dtype is not None]
        for x, output in known:
            output.type, output.shape = x.type, x.shape
        if not known:
            break


def own_constants(graph: Graph) -> None:
    """Give each node that reads a small constant of the main graph one of its own, of a graph with layers of integers."""
    for value in list(graph.model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.size > _LARGEST_OWN or tensor.dtype == ir.DataType.STRING or value.is_graph_input():
            continue
        uses = [(use.node, use.idx) for use in value.uses() if use.node.graph is graph.model.graph]
        for node, place in uses[1:]:
            node.replace_input_with(place, add_constant(graph, str(value.name), tensor.numpy()))


def _said(done: Mapping[str, int]) -> tuple[str, ...]:
    found = ", ".join(f"{count} {what}" for what, count in done.items() if count)
    return (f"spelled as OpenVINO reads them right: {found}",) if found else ()


def _nothing(dtype: ir.DataType) -> npt.NDArray[Any]:
    return np.array(_NOTHING_HALF if dtype == ir.DataType.FLOAT16 else _NOTHING, dtype.numpy())


def _axes(node: ir.Node) -> list[int]:
    """Over which axes, counted from the first, a reduction of floats goes that has to be spelled anew; else none."""
    x = node.inputs[0]
    count = rank(x)
    axes = reduced_axes(node)
    if axes is None or count is None or x is None or x.dtype not in _FLOATS or attribute(node, "keepdims", 1):
        return []
    return sorted(axis % count for axis in axes)


def _keep_axes(graph: Graph, node: ir.Node) -> bool:
    axes, x, output = _axes(node), node.inputs[0], node.outputs[0]
    if not axes:
        return False
    assert x is not None
    assert x.shape is not None
    name = name_of(node)

    def numbers(what: str, *of: int) -> ir.Value:
        return add_constant(graph, f"{name}_{what}", np.array(of, np.int64))

    new = list(range(1, 1 + AXES - len(x.shape)))  # behind the batch: OpenVINO fails over one behind quantized channels
    sizes: list[int | str | None] = [size if isinstance(size, int) else size.value for size in x.shape]
    shape = [*sizes[:1], *[1] * len(new), *sizes[1:]]
    axes = [axis + len(new) if axis else axis for axis in axes]
    if new:
        x = insert(node, "Unsqueeze", [x, numbers("new", *new)], name=f"{name}_wide", dtype=x.dtype, shape=shape)
    shape = [1 if axis in axes else size for axis, size in enumerate(shape)]
    attributes = {"axes": axes} if "axes" in node.attributes else {}
    kept = insert(
        node,
        node.op_type,
        [x] if attributes else [x, numbers("axes", *axes)],
        {**attributes, "keepdims": 1},
        name=f"{name}_kept",
        dtype=output.dtype,
        shape=shape,
    )
    squeezed = insert(
        node,
        "Squeeze",
        [kept, numbers("gone", *sorted([*axes, *new]))],
        name=f"{name}_squeezed",
        dtype=output.dtype,
        shape=output.shape,
    )
    replace_value(graph, output, squeezed)
    graph.model.graph.remove(node, safe=True)
    return True


def _name_all_axes(graph: Graph, node: ir.Node, wide: dict[tuple[ir.Value, int], ir.Value]) -> None:
    """Of a constant beside an image. wide: those that were made, by constant and number of axes."""
    count = rank(node.outputs[0])
    for place, value in enumerate(node.inputs):
        array = constant(value)
        if value is None or array is None or count is None or count < AXES or not 1 < array.ndim < count:
            continue
        if (value, count) not in wide:
            named = array.reshape(*[1] * (count - array.ndim), *array.shape)
            wide[value, count] = add_constant(graph, str(value.name), named)
        node.replace_input_with(place, wide[value, count])


def _norm_over_layer(graph: Graph, node: ir.Node) -> None:
    x, output, count = node.inputs[0], node.outputs[0], rank(node.inputs[0])
    scale, bias = constant(node.inputs[1]), constant(node.inputs[2])
    if attribute(node, "num_groups", 0) != 1 or x is None or scale is None or bias is None:
        return
    if count is None or count < AXES:
        return
    name = name_of(node)
    value = x
    for op_type, what, array in (
        ("LayerNormalization", "one", np.ones((1,) * (count - 1), scale.dtype)),
        ("Mul", "scale", scale.reshape(1, -1, *[1] * (count - 2))),
        ("Add", "shift", bias.reshape(1, -1, *[1] * (count - 2))),
    ):
        value = insert(
            node,
            op_type,
            [value, add_constant(graph, f"{name}_{what}", array)],
            {"axis": 1, "epsilon": attribute(node, "epsilon", 1e-5)} if value is x else {},
            name=f"{name}_{op_type}",
            dtype=output.dtype,
            shape=output.shape,
        )
    replace_value(graph, output, value)
    graph.model.graph.remove(node, safe=True)


def _slice(graph: Graph, node: ir.Node) -> bool:
    """Where one place is taken, which is fixed."""
    x, output, index = node.inputs[0], node.outputs[0], constant(node.inputs[1])
    if x is None or x.dtype not in _FLOATS or constant(x) is not None or index is None or index.shape not in ((), (1,)):
        return False
    name, place, axis = name_of(node), int(index.reshape(())), attribute(node, "axis", 0)
    end = place + 1 or np.iinfo(np.int64).max  # -1 is the last
    bounds = [
        add_constant(graph, f"{name}_{what}", np.array([number], np.int64))
        for what, number in (("start", place), ("end", end), ("axis", axis))
    ]
    taken = insert(node, "Slice", [x, *bounds], name=f"{name}_sliced", dtype=x.dtype)
    if x.shape is not None:
        taken.shape = ir.Shape([1 if at == axis % len(x.shape) else size for at, size in enumerate(x.shape)])
    if not index.ndim:
        inputs = [taken, bounds[2]]
        taken = insert(node, "Squeeze", inputs, name=f"{name}_squeezed", dtype=output.dtype, shape=output.shape)
    replace_value(graph, output, taken)
    graph.model.graph.remove(node, safe=True)
    return True


def _pad_before(graph: Graph, node: ir.Node) -> bool:
    x, around = node.inputs[0], list(attribute(node, "pads", []))
    if x is None or x.dtype not in _FLOATS or not any(around) or not attribute(node, "count_include_pad", 0):
        return False
    if attribute(node, "ceil_mode", 0):  # which windows then hang over the end is said of the padding
        return False
    half = len(around) // 2
    name = name_of(node)
    amounts = np.array([0, 0, *around[:half], 0, 0, *around[half:]], np.int64)
    inputs = [
        x,
        add_constant(graph, f"{name}_around", amounts),
        add_constant(graph, f"{name}_nothing", _nothing(x.dtype)),
    ]
    padded = insert(node, "Pad", inputs, name=f"{name}_pad", dtype=x.dtype)
    if x.shape is not None:
        more = amounts.reshape(2, -1).sum(0).tolist()
        padded.shape = ir.Shape(
            [size + by if isinstance(size, int) else None for size, by in zip(x.shape, more, strict=True)]
        )
        padded.shape[0] = x.shape[0]
    node.replace_input_with(0, padded)
    node.attributes.pop("pads")
    node.attributes.pop("count_include_pad")
    return True


def _widen(graph: Graph, node: ir.Node) -> bool:
    """By a tap of zeros, so that rows are not filled. Wrong were integers of 4 to 28 channels a group, and bfloat16 of 2 to 12; other widths
    were right. Not where the padding hangs on sizes: SAME with strides.
    """
    source = node.inputs[1]
    while (identity := produced_by(source, "Identity")) is not None:
        source = identity.inputs[0]
    weight = constant(source)
    if weight is None or attribute(node, "group", 1) == 1:
        return False
    channels, spatial, row = weight.shape[1], weight.ndim - 2, weight.shape[1] * weight.shape[-1]
    if channels >= _ROW or row < 2 * _ROW or row % (_ROW if channels < _ROW // 2 else 2 * _ROW):
        return False
    auto, dilations = attribute(node, "auto_pad", "NOTSET"), attribute(node, "dilations", [1] * spatial)
    around = list(attribute(node, "pads", [0] * 2 * spatial))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        if set(attribute(node, "strides", [1])) != {1}:
            return False
        both = [(size - 1) * step for size, step in zip(weight.shape[2:], dilations, strict=True)]
        less, more = [size // 2 for size in both], [size - size // 2 for size in both]
        around = less + more if auto == "SAME_UPPER" else more + less
    around[-1] += dilations[-1]
    wider = np.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, 1)])
    node.attributes.pop("auto_pad", None)
    node.attributes["pads"] = ir.AttrInt64s("pads", around)
    node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", wider.shape[2:])
    node.replace_input_with(1, add_constant(graph, f"{name_of(node)}_weight", wider))
    return True


def _part(graph: Graph, node: ir.Node) -> bool:
    """From what comes behind, but for operators over which a maximum may be moved."""
    x, output = node.inputs[0], node.outputs[0]
    places = [(use.node, use.idx) for use in output.uses()]
    if x is None or x.dtype not in _FLOATS or all(user.op_type in _RISING for user, _ in places):
        return False
    nothing = add_constant(graph, f"{node.name or output.name}_nothing", _nothing(x.dtype))
    put_behind(graph, output, ir.node("Add", [output, nothing], name=f"{node.name or output.name}_parted"))
    return True


def _give_bias(graph: Graph, node: ir.Node) -> bool:
    weight = constant(node.inputs[1])
    bias = optional(node, 2)
    if weight is None or weight.dtype != np.float32 or node.outputs[0].dtype != ir.DataType.FLOAT:
        return False
    if bias is not None and ((array := constant(bias)) is None or array.any()):
        return False
    channels = weight.shape[0] if node.op_type == "Conv" else weight.shape[1] * attribute(node, "group", 1)
    nothing = np.full(channels, _NOTHING, np.float32)
    set_input(node, 2, add_constant(graph, f"{name_of(node)}_bias", nothing))
    return True
