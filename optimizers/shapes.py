"""Reads shape arithmetic: what a Reshape's target holds, as numbers or as "the size of that value's axis".

PyTorch's exporters compute targets from Shape, Gather, Slice and Concat of other values; two sizes are equal where
the numbers or the symbolic names are, or where both come from one axis of one value.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnxpress.optimizers.matching import attribute, constant, dimension, produced_by, rank

Size = int | str | tuple[int, int]  # number, symbolic name, or (identity of a value, axis)

_SAME_SIZES = ("Cast", "Identity", "Erf", "Gelu", "Relu", "Tanh", "Sigmoid", "LayerNormalization")


_SEQUENCES = (
    "SplitToSequence",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceMap",
    "Optional",
)


def infer_shapes(model: ir.Model) -> None:
    """Write shapes and types into a model's values, symbolic ones too, as far as ONNX infers them; not where there are sequences,
    which onnx_ir (1.1.0) would take for tensors.
    """
    if not any(node.op_type in _SEQUENCES for node in model.graph.all_nodes()):
        ShapeInferencePass(check_type=False, strict_mode=False)(model)


def size(value: ir.Value, axis: int) -> Size:
    """The size of an axis (counted from the front); unnamed ones are followed to where they come from."""
    known = dimension(value, axis)
    if known is not None:
        return known
    node = value.producer()
    if node is not None and node.domain == "" and node.inputs and node.inputs[0] is not None:
        source = node.inputs[0]
        if node.op_type in _SAME_SIZES:
            return size(source, axis)
        if node.op_type == "Add":
            for first, second in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
                array = constant(second)
                if first is not None and array is not None and array.ndim <= 1:
                    return size(first, axis)
        weight = constant(node.inputs[1]) if node.op_type == "MatMul" else None
        if weight is not None and weight.ndim == 2 and rank(source) is not None and axis < (rank(source) or 0) - 1:
            return size(source, axis)
        if node.op_type == "Transpose" and "perm" in node.attributes:
            return size(source, list(attribute(node, "perm", ()))[axis])
    return (id(value), axis)


def elements(shape: ir.Value | None) -> list[Size | None] | None:
    """The entries of a one-dimensional (or scalar) integer value; None for an entry that is not understood."""
    if (rank(shape) or 0) > 1:
        return None
    array = constant(shape)
    if array is not None:
        return [int(number) for number in array.reshape(-1)]
    node = produced_by(
        shape, "Shape", "Slice", "Gather", "Concat", "Unsqueeze", "Squeeze", "Cast", "Identity", "Reshape"
    )
    if node is None:
        count = dimension(shape, 0)
        return [None] * count if isinstance(count, int) else None
    if node.op_type == "Shape":
        source = node.inputs[0]
        count = rank(source)
        if source is None or count is None:
            return None
        axes = range(count)[attribute(node, "start", 0) : attribute(node, "end", None)]
        return [size(source, axis) for axis in axes]
    if node.op_type == "Concat":
        parts = [elements(part) for part in node.inputs]
        return None if any(part is None for part in parts) else [entry for part in parts for entry in part or ()]
    if node.op_type == "Cast" and attribute(node, "to", 0) not in (ir.DataType.INT32.value, ir.DataType.INT64.value):
        return None
    found = elements(node.inputs[0])
    if found is None:
        return None
    if node.op_type == "Slice":
        bounds = [constant(value) for value in node.inputs[1:3]]
        steps = constant(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
        if len(bounds) < 2 or any(bound is None for bound in bounds) or steps is None or steps.tolist() != [1]:
            return None
        start, end = (int(bound.reshape(())) for bound in bounds if bound is not None)
        return found[start:end]
    if node.op_type == "Gather":
        index = constant(node.inputs[1])
        if index is None or any(not -len(found) <= position < len(found) for position in index.reshape(-1)):
            return None
        return [found[int(position)] for position in index.reshape(-1)]
    return found  # Unsqueeze, Squeeze, Cast, Identity, Reshape keep the entries


def reshaped(reshape: ir.Node) -> list[Size | None] | None:
    """The sizes of what a Reshape gives; None where unknown or -1 (to be inferred)."""
    source, output = reshape.inputs[0], reshape.outputs[0]
    target = elements(reshape.inputs[1])
    if target is None or source is None:
        return None if output.shape is None else [dimension(output, axis) for axis in range(len(output.shape))]
    result: list[Size | None] = []
    for axis, entry in enumerate(target):
        known = dimension(output, axis) if rank(output) == len(target) else None
        if isinstance(known, int):
            result.append(known)
        elif entry == 0 and not attribute(reshape, "allowzero", 0):
            result.append(size(source, axis))
        else:
            result.append(known if entry is None else None if entry == -1 else entry)
    return result
