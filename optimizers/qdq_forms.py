"""Spells parts of convolution networks in operators that ONNX Runtime's CPU provider runs fast on integers; answers stay the same.

    ReduceMean over an image              →   GlobalAveragePool
    BatchNormalization, behind no Conv    →   Conv of 1x1, each channel by itself, whose weights 8 bits hold exactly
                                              (where what it reads is quantized for others, or has channels of like size)
    Conv of groups of a few channels      →   Conv of groups of 32, with zeros for what was apart
    Split in known parts                  →   Slice, for each of them
    Pad of named axes                     →   Pad of all of them: ONNX Runtime's layout optimizer takes them for that, and fails

onnxruntime 1.32, 2 threads of an EPYC (Zen 4), milliseconds of a 3x3 convolution over 4 images of 28x28, 96 channels in groups of 1, 2, 4, 8,
16, 32: integers 0.07, 5.5, 1.9, 0.93, 0.60, 0.49; floats 0.08, 0.43, 0.49, 0.61, 0.47, 0.85. Groups of 1 have a kernel of their own, with
one output channel each; two outputs of each of 48 take 6.4 ms (floats 0.35).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.edits import add_constant, insert, replace_constant, replace_node, replace_value
from onnxpress.optimizers.fuse_convolutions import normalization, pad_amounts
from onnxpress.optimizers.matching import attribute, body_nodes, constant, dimension, name_of, rank, reduced_axes

_CHANNELS = 32  # of a group
_STEPS = 3  # of 8 bits that a channel's deviation has at least; their error is then a tenth of it


def spell_for_integers(graph: Graph, keep: Collection[str]) -> None:
    """Put all of them into the main graph, but for convolutions and norms that are to be kept in float."""
    _pool_instead_of_means(graph)
    for node in body_nodes(graph, "Split"):
        _slices_instead_of_split(graph, node)
    for node in body_nodes(graph, "Pad"):
        _name_no_axes(graph, node)
    for node in body_nodes(graph, "BatchNormalization", "Conv"):
        if name_of(node) in keep:
            continue
        if node.op_type == "Conv":
            _widen_groups(graph, node)
        else:
            _convolution_instead_of_norm(graph, node)


def _pool_instead_of_means(graph: Graph) -> None:
    """And Squeeze, with keepdims=0."""
    for node in body_nodes(graph, "ReduceMean"):
        source, output = node.inputs[0], node.outputs[0]
        axes = reduced_axes(node)
        if (
            source is None
            or rank(source) != 4
            or source.dtype != ir.DataType.FLOAT
            or axes is None
            or sorted(axis % 4 for axis in axes) != [2, 3]
        ):
            continue
        name, keeps = name_of(node), attribute(node, "keepdims", 1)
        shape = [dimension(source, 0), dimension(source, 1), 1, 1]
        pooled = insert(node, "GlobalAveragePool", [source], name=f"{name}_pooled", dtype=source.dtype, shape=shape)
        if not keeps:
            two = add_constant(graph, f"{name}_axes", np.array([2, 3], np.int64))
            pooled = insert(
                node, "Squeeze", [pooled, two], name=f"{name}_squeezed", dtype=output.dtype, shape=output.shape
            )
        replace_value(graph, output, pooled)
        graph.model.graph.remove(node, safe=True)


def _slices_instead_of_split(graph: Graph, node: ir.Node) -> None:
    """Of an image's channels."""
    axis = attribute(node, "axis", 0)
    sizes = [dimension(output, axis) for output in node.outputs]
    numbers = [size for size in sizes if isinstance(size, int)]
    source = node.inputs[0]
    if source is None or source.dtype != ir.DataType.FLOAT or len(numbers) < len(sizes):
        return
    if rank(source) != 4 or axis not in (1, -3):  # channels; attention's heads are split elsewhere
        return
    ends, name = np.cumsum(numbers), name_of(node)
    bounds = [
        [add_constant(graph, f"{name}_{end}", np.array([end], np.int64)) for end in (stop - size, stop, axis)]
        for size, stop in zip(numbers, ends.tolist(), strict=True)
    ]
    for index, (output, bound) in enumerate(zip(node.outputs, bounds, strict=True)):
        part = insert(
            node, "Slice", [source, *bound], name=f"{name}_part_{index}", dtype=output.dtype, shape=output.shape
        )
        replace_value(graph, output, part)
    graph.model.graph.remove(node, safe=True)


def _name_no_axes(graph: Graph, node: ir.Node) -> None:
    count = rank(node.inputs[0])
    around = None if count is None or len(node.inputs) < 4 else pad_amounts(node, count)
    if around is None:
        return
    node.replace_input_with(1, add_constant(graph, f"{name_of(node)}_around", around.reshape(-1)))
    node.resize_inputs(3)


def _convolution_instead_of_norm(graph: Graph, node: ir.Node) -> None:
    """Where a convolution reads the same, or its channels are of like size: it is quantized with one scale for all of them, and many norms
    are there because channels differ.
    """
    found, x = normalization(node), node.inputs[0]
    if found is None or x is None or rank(x) != 4 or x.dtype != ir.DataType.FLOAT:
        return
    mean, variance = (constant(value) for value in node.inputs[3:5])
    assert mean is not None
    assert variance is not None
    deviation = np.sqrt(variance)
    step = ((mean + 3 * deviation).max() - (mean - 3 * deviation).min()) / 255
    quantized = any(use.node.op_type == "Conv" for use in x.uses())
    if not quantized and (x.producer() is None or deviation.min() < _STEPS * step):
        return
    scale, shift = (numbers.astype(np.float32) for numbers in found)
    name = name_of(node)
    weight = add_constant(graph, f"{name}_weight", scale.reshape(-1, 1, 1, 1))
    bias = add_constant(graph, f"{name}_bias", shift)
    convolution = ir.node(
        "Conv", [node.inputs[0], weight, bias], {"group": len(scale), "kernel_shape": [1, 1]}, name=name
    )
    replace_node(graph, node, convolution)


def _widen_groups(graph: Graph, node: ir.Node) -> None:
    weight, groups = constant(node.inputs[1]), attribute(node, "group", 1)
    if weight is None or weight.dtype != np.float32 or groups == 1:
        return
    outputs, inputs = len(weight) // groups, weight.shape[1]
    together = max((n for n in range(1, groups + 1) if groups % n == 0 and n * inputs <= _CHANNELS), default=1)
    if together == 1 or inputs == outputs == 1:
        return
    wide: npt.NDArray[np.float32] = np.zeros((len(weight), together * inputs, *weight.shape[2:]), np.float32)
    for channel, numbers in enumerate(weight):
        first = channel // outputs % together * inputs
        wide[channel, first : first + inputs] = numbers
    replace_constant(graph, node, 1, wide)
    node.attributes["group"] = ir.AttrInt64("group", groups // together)
