"""Spells what OpenVINO misreads as it reads it right, and says which layers it would misread on integers.

    ReduceMean(x), without the axes that it took   →   Squeeze(ReduceMean(x)), over an x of four axes or more; other reductions, too
    Gather(x), of one place on an axis             →   Squeeze(Slice(x))
    AveragePool(x), that counts its padding        →   AveragePool(Pad(x))
    Gelu(MaxPool(x)), and others                   →   Gelu(MaxPool(x) + b), with a b that is next to nothing
    Conv(x, w)                                     →   Conv(x, w, b), with such a b

And what it reads right and runs slowly as it runs it fast

    x * s, s of a number a channel, (C, 1, 1)      →   x * s, (1, C, 1, 1): else x is put into another layout, and back
    GroupNormalization(x), of one group            →   LayerNormalization(x) * s + b, likewise
    small constants that several nodes read        →   one for each: else a layer's bias and what follows are nodes of their own
    layer(scale * (q - zero point)) + b            →   layer(scale * q) + (b - scale * zero point * the weights' sums)
                                                       (these two beside integers alone)

OpenVINO 2026.4 on a CPU, onnxruntime-ep-openvino 1.8.1, answers by other numbers, and says nothing, where

- the mean over the last of three axes is added to, or multiplied by, numbers of each channel (in float32 too; a batch of one is right)
- the maximum over windows of what a convolution gives goes through a function that does not only rise (in float32 too): it is taken behind that
- a mean that counts its padding is taken of what was multiplied or added to by numbers of each channel, if anything in the graph is quantized
- one place on an axis is taken of what a matrix product of integers gives
- what a convolution of integers without a bias gives is read quantized and in float
- what a layer of integers reads was multiplied by negative numbers of each channel, or is a maximum; and others (`misread`)

Found by random graphs beside the CPU provider without its optimizers (benchmarks/random_graphs.py), and by variations of them; tests/optimizers/test_openvino_forms.py has one of each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from onnxpress.errors import ConversionError
from onnxpress.graph import Graph
from onnxpress.optimizers.dependencies import ELEMENTWISE
from onnxpress.optimizers.fuse_convolutions import normalization
from onnxpress.optimizers.linear import add_constant, attribute, insert_behind, replace_value, unused_name
from onnxpress.optimizers.matching import body_nodes, constant, insert, only_user, produced_by, rank
from onnxpress.optimizers.opset import raise_opset

_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum",
               "ReduceLogSumExp", "ReduceSumSquare")  # fmt: skip
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_AXES = 4
_NOTHING = 1e-12  # OpenVINO drops a bias of zeros
_NOTHING_HALF = 1e-7  # about float16's smallest
_OPSET = 13  # the first whose Squeeze has its axes as an input
_LARGEST_OWN = 8192  # numbers of a constant that is copied for each reader

_SUMS = ("ReduceMean", "ReduceSum")
_EXTREMES = frozenset({"GlobalMaxPool", *_REDUCTIONS}) - frozenset(_SUMS)
# Operators over which factors are carried.
_CARRYING = frozenset({
    "AveragePool", "Clip", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GlobalAveragePool", "Identity",
    "LeakyRelu", "MaxPool", "Pad", "Relu", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", *_SUMS,
})  # fmt: skip
_REARRANGING = frozenset({"Flatten", "Gather", "Reshape", "Squeeze", "Unsqueeze"})
_SUM, _NARROW_MEAN, _FUNCTION = "a sum", "a mean over fewer than four axes", "a function"
_RISING = frozenset({
    "Add", "AveragePool", "BatchNormalization", "Concat", "Conv", "ConvTranspose", "GlobalAveragePool", "MaxPool", "Relu",
})  # fmt: skip
_POSITIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax"})
_SMALL_GROUP, _LARGE_GROUP = 16, 32  # channels
_CARRIED_WRONGLY = frozenset({"Gather", _NARROW_MEAN})


def respell(graph: Graph) -> tuple[str, ...]:
    """Change what is misread or slow in floats; says what was misread. Answers stay the same but for rounding."""
    _infer_shapes(graph)
    notes: tuple[str, ...] = ()
    reductions = 0
    if any(_axes(node) for node in body_nodes(graph, *_REDUCTIONS)):
        try:
            raise_opset(graph, _OPSET)
            reductions = sum(_keep_axes(graph, node) for node in body_nodes(graph, *_REDUCTIONS))
        except ConversionError as error:
            notes = (f"reductions stay as they are, and OpenVINO may misread them: {error}",)
    maxima = sum(_part(graph, node) for node in body_nodes(graph, "MaxPool"))
    for node in body_nodes(graph, "GroupNormalization"):
        _norm_over_layer(graph, node)
    wide: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in body_nodes(graph, "Add", "Sub", "Mul", "Div"):
        _name_all_axes(graph, node, wide)
    return _said({"reductions": reductions, "windows' maxima": maxima}) + notes


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
        ShapeInferencePass(check_type=False, strict_mode=False)(graph.model)
        stuck = [(node.inputs[0], node.outputs[0]) for node in norms if node.outputs[0].dtype is None]
        known = [(x, output) for x, output in stuck if x is not None and x.dtype is not None]
        for x, output in known:
            output.type, output.shape = x.type, x.shape
        if not known:
            break


def fold_zero_points(graph: Graph, layers: Collection[ir.Node]) -> None:
    """Take the zero points of what layers of integers read into their biases, where such layers alone read it, and without padding.

    layers: MatMul, Gemm, Conv and ConvTranspose as int8-qdq writes them.
    """
    for node in dict.fromkeys(produced_by(layer.inputs[0], "DequantizeLinear") for layer in layers):
        assert node is not None
        scale, zero_point = constant(node.inputs[1]), constant(node.inputs[2])
        assert scale is not None
        assert zero_point is not None
        if zero_point.any():
            uses = list(node.outputs[0].uses())
            if not all(use.idx == 0 and use.node in layers and _reads_no_padding(use.node) for use in uses):
                continue
            for use in uses:
                _add_to_bias(graph, use.node, -scale.item() * zero_point.item())
        node.resize_inputs(2)


def _reads_no_padding(layer: ir.Node) -> bool:
    return layer.op_type in ("MatMul", "Gemm") or (layer.op_type == "Conv" and not _is_padded(layer))


def _add_to_bias(graph: Graph, layer: ir.Node, number: float) -> None:
    """What a layer answers to this number everywhere: its third input, or what is added behind a MatMul."""
    dequantize, output = produced_by(layer.inputs[1], "DequantizeLinear"), layer.outputs[0]
    assert dequantize is not None
    integers, scales = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    assert integers is not None
    assert scales is not None
    rest = tuple(axis for axis in range(integers.ndim) if axis != attribute(dequantize, "axis", 1))
    shift = number * integers.sum(axis=rest, dtype=np.int64) * scales.astype(np.float64)
    name, holder, place = layer.name or str(output.name), layer, 2
    if layer.op_type == "MatMul":
        add = only_user(output, "Add")
        place = 0 if add is None or add.inputs[1] is output else 1
        array = None if add is None else constant(add.inputs[place])
        if add is None or array is None or array.shape not in ((), shift.shape):
            bias = add_constant(graph, f"{name}_shift", shift.astype(np.float32))
            _put_behind(graph, output, ir.node("Add", [output, bias], name=f"{name}_shifted"))
            return
        holder = add
    holder.resize_inputs(max(len(holder.inputs), place + 1))
    old = constant(holder.inputs[place])
    new = shift if old is None else old + shift
    holder.replace_input_with(place, add_constant(graph, f"{name}_bias", new.astype(np.float32)))


def _put_behind(graph: Graph, value: ir.Value, node: ir.Node) -> None:
    """Let a node that reads a value give what the value's other readers read."""
    uses = [(use.node, use.idx) for use in value.uses() if use.node is not node]
    insert_behind(graph, value, [node])
    output = node.outputs[0]
    output.name = unused_name(graph.model.graph, str(node.name))
    output.type, output.shape = value.type, value.shape
    if value.is_graph_output():
        replace_value(graph, value, output)
        node.replace_input_with(0, value)
    for user, place in uses:
        user.replace_input_with(place, output)


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
    axes = attribute(node, "axes", None)  # an attribute before opset 18, of ReduceSum before 13
    if axes is None and len(node.inputs) > 1:
        array = constant(node.inputs[1])
        axes = None if array is None else array.reshape(-1).tolist()
    if axes is None or count is None or x is None or x.dtype not in _FLOATS or attribute(node, "keepdims", 1):
        return []
    return sorted(int(axis) % count for axis in axes)


def _keep_axes(graph: Graph, node: ir.Node) -> bool:
    axes, x, output = _axes(node), node.inputs[0], node.outputs[0]
    if not axes:
        return False
    assert x is not None
    assert x.shape is not None
    name = node.name or str(output.name)

    def numbers(what: str, *of: int) -> ir.Value:
        return add_constant(graph, f"{name}_{what}", np.array(of, np.int64))

    new = list(
        range(1, 1 + _AXES - len(x.shape))
    )  # behind the batch: OpenVINO fails over one behind quantized channels
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
        if value is None or array is None or count is None or count < _AXES or not 1 < array.ndim < count:
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
    if count is None or count < _AXES:
        return
    name = node.name or str(output.name)
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
    name, place, axis = node.name or str(output.name), int(index.reshape(())), attribute(node, "axis", 0)
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
    name = node.name or str(node.outputs[0].name)
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


def _part(graph: Graph, node: ir.Node) -> bool:
    """From what comes behind, but for operators over which a maximum may be moved."""
    x, output = node.inputs[0], node.outputs[0]
    places = [(use.node, use.idx) for use in output.uses()]
    if x is None or x.dtype not in _FLOATS or all(user.op_type in _RISING for user, _ in places):
        return False
    nothing = add_constant(graph, f"{node.name or output.name}_nothing", _nothing(x.dtype))
    _put_behind(graph, output, ir.node("Add", [output, nothing], name=f"{node.name or output.name}_parted"))
    return True


def _give_bias(graph: Graph, node: ir.Node) -> bool:
    weight = constant(node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None or weight.dtype != np.float32 or node.outputs[0].dtype != ir.DataType.FLOAT:
        return False
    if bias is not None and ((array := constant(bias)) is None or array.any()):
        return False
    channels = weight.shape[0] if node.op_type == "Conv" else weight.shape[1] * attribute(node, "group", 1)
    node.resize_inputs(3)
    node.replace_input_with(
        2, add_constant(graph, f"{node.name or node.outputs[0].name}_bias", np.full(channels, _NOTHING, np.float32))
    )
    return True


def misread(value: ir.Value, layer: ir.Node | None = None) -> str:
    """Why OpenVINO would misread a value that is quantized, or what a layer of integers makes of it; or nothing.

    It carries factors, and what is added behind them, over other operators to what quantizes behind those. Tried operator by operator
    with a convolution or matrix product behind; a norm of the last of three axes and what comes after it are read right.
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
    if groups > 1 and not small and _is_padded(node) and not _is_positive(x):
        return "Conv of padded groups that reads negative numbers"
    return ""


def _is_padded(node: ir.Node) -> bool:
    return any(attribute(node, "pads", [])) or attribute(node, "auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")


def _is_positive(value: ir.Value | None) -> bool:
    """Whether nothing in a value is below zero, so that zero is its smallest code."""
    node = None if value is None else value.producer()
    if node is None:
        return False
    if node.op_type == "Clip":
        low = constant(node.inputs[1]) if len(node.inputs) > 1 else None
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
        if node.op_type == "AveragePool" and attribute(node, "count_include_pad", 0) and _is_padded(node):
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
        if node.op_type in _SUMS and (rank(node.inputs[0]) or 0) < _AXES:
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
