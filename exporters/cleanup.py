"""Makes a freshly exported graph plain: readable names, weights as (in, out), no no-op reshapes, no stack traces.

Transpose(weight) → MatMul        →   MatMul with the weight stored as (in, out), as a view of the same memory
Reshape(Reshape(x)) of x's shape  →   x
Transpose(Transpose(x)), the second undoing the first  →   x
Attention(…, mask of (…, 1, keys))  →   Attention(…, Expand(mask) to (…, queries, keys)), which ONNX Runtime's kernel asks for
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    RemoveUnusedNodesPass,
    TopologicalSortPass,
)
from onnxscript import optimizer


def clean(model: ir.Model, *, inputs: Mapping[str, Sequence[int | str]], prefix: str) -> None:
    """Clean a graph in place.

    inputs: the shape of each input, symbolic axes by name; the exporter's own names for them go. prefix: what to
    take off the names of the weights.
    """
    _name_axes(model.graph, inputs)
    _name_weights(model.graph, prefix)
    _widen_masks(model.graph)
    _store_weights_transposed(model.graph)
    # What is plainly idle goes first: the optimizer tries each of its patterns at every node that is left.
    _drop_noop_transposes(model.graph)
    _drop_noop_reshapes(model.graph)
    RemoveUnusedNodesPass()(model)
    # Folding a transposed weight that is tied to an embedding would store it twice.
    optimizer.optimize_ir(model, should_fold=lambda node: False if _transposes_weight(node) else None)
    _drop_noop_reshapes(model.graph)
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)
    _name_linear_layers(model.graph)
    _drop_notes(model)


def _drop_notes(model: ir.Model) -> None:
    """The exporter writes stack traces, with this machine's paths, into every node, and notes into every value."""
    ClearMetadataAndDocStringPass()(model)
    outputs = [value for node in model.graph.all_nodes() for value in node.outputs]
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *outputs):
        value.metadata_props.clear()


def _name_axes(graph: ir.Graph, inputs: Mapping[str, Sequence[int | str]]) -> None:
    names: dict[str, str] = {}
    for value in graph.inputs:
        wanted = inputs[str(value.name)]
        assert value.shape is not None
        for axis, name in zip(value.shape, wanted, strict=True):
            if isinstance(axis, ir.SymbolicDim) and isinstance(name, str):
                names[str(axis.value)] = name
    values = {value for node in graph.all_nodes() for value in (*node.inputs, *node.outputs) if value is not None}
    for value in (*graph.inputs, *graph.outputs, *values):
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape([_renamed(axis, names) for axis in value.shape])


def _renamed(axis: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(axis, int):
        return axis
    return None if axis.value is None else names.get(str(axis.value), str(axis.value))


def _name_weights(graph: ir.Graph, prefix: str) -> None:
    taken = set(graph.initializers)
    for name, value in list(graph.initializers.items()):
        short = name.removeprefix(prefix)
        if short != name and short not in taken:
            value.name = short
            taken.add(short)


def _widen_masks(graph: ir.Graph) -> None:
    """Repeat a mask that is the same for all queries: of padding, (batch, 1, 1, keys)."""
    for node in list(graph):
        mask = node.inputs[3] if node.op_type == "Attention" and node.domain == "" and len(node.inputs) > 3 else None
        if mask is None or mask.shape is None or len(mask.shape) < 2 or mask.shape[-2] != 1:
            continue
        query = node.inputs[0]
        assert query is not None
        assert query.shape is not None
        if query.shape[-2] == 1:
            continue
        name = f"{node.name}_mask"
        axis = len(query.shape) - 2  # (batch, heads, queries, head_dim) or (batch, queries, heads · head_dim)
        length = ir.node("Shape", [query], {"start": axis, "end": axis + 1}, name=f"{name}_queries")
        one = ir.Value(name=f"{name}_one", const_value=ir.tensor(np.array([1])))
        graph.register_initializer(one)
        ones = [one] * (len(mask.shape) - 2)
        shape = ir.node("Concat", [*ones, length.outputs[0], one], {"axis": 0}, name=f"{name}_shape")
        wide = ir.node("Expand", [mask, shape.outputs[0]], name=f"{name}_expand")
        if mask.dtype is not None:
            wide.outputs[0].dtype = mask.dtype
        wide.outputs[0].shape = ir.Shape([*mask.shape[:-2], query.shape[-2], mask.shape[-1]])
        graph.insert_before(node, [length, shape, wide])
        node.replace_input_with(3, wide.outputs[0])


def _store_weights_transposed(graph: ir.Graph) -> None:
    """Replace Transpose(weight) by a transposed view of the weight, where the weight has no other use."""
    for value in list(graph.initializers.values()):
        nodes = {use.node for use in value.uses()}
        tensor = value.const_value
        if tensor is None or not nodes or not all(_transposes_weight(node) for node in nodes):
            continue
        view = ir.Tensor(tensor.numpy().T, name=value.name)
        value.const_value, value.shape = view, ir.Shape(view.shape)
        for node in nodes:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph.remove(node, safe=True)


def _transposes_weight(node: ir.Node) -> bool:
    if node.op_type != "Transpose" or node.domain != "" or node.graph is None:
        return False
    source = node.inputs[0]
    permutation = node.attributes.get("perm")
    return (
        source is not None
        and source.is_initializer()
        and source.shape is not None
        and len(source.shape) == 2
        and (permutation is None or list(permutation.as_ints()) == [1, 0])  # exporters write [0, 1] too
        and not node.outputs[0].is_graph_output()
    )


def _drop_noop_transposes(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "Transpose" or node.domain != "" or node.outputs[0].is_graph_output():
            continue
        source = node.inputs[0]
        before = None if source is None else source.producer()
        if before is None or before.op_type != "Transpose" or before.domain != "":
            continue
        first, second = (list(item.attributes["perm"].as_ints()) for item in (before, node))
        original = before.inputs[0]
        if original is not None and [first[axis] for axis in second] == list(range(len(first))):
            ir.convenience.replace_all_uses_with(node.outputs[0], original)


def _drop_noop_reshapes(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "Reshape" or node.domain != "" or node.outputs[0].is_graph_output():
            continue
        source: ir.Value | None = node.inputs[0]
        while source is not None:
            if _same_shape(source, node.outputs[0]):
                ir.convenience.replace_all_uses_with(node.outputs[0], source)
                break
            producer = source.producer()
            source = producer.inputs[0] if producer is not None and producer.op_type == "Reshape" else None


def _same_shape(one: ir.Value, other: ir.Value) -> bool:
    if one.shape is None or other.shape is None:
        return False
    if any(isinstance(axis, ir.SymbolicDim) and axis.value is None for axis in one.shape):
        return False
    return list(one.shape) == list(other.shape)


def _name_linear_layers(graph: ir.Graph) -> None:
    """Call a MatMul after the layer whose weight it reads, e.g. encoder.layer.0.attention.self.query."""
    counts: dict[str, int] = {}
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = node.inputs[1]
        if weight is not None and (producer := weight.producer()) is not None and _transposes_weight(producer):
            weight = producer.inputs[0]
        if weight is None or not weight.is_initializer():
            continue
        name = str(weight.name).removesuffix(".weight")
        counts[name] = counts.get(name, 0) + 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
