"""Says which values of a graph become 8-bit numbers and who reads them, before anything is changed.

Layers are Conv, ConvTranspose, MatMul and Gemm with constant float32 weights. What lies between them joins in where ONNX Runtime's CPU
provider has a kernel for it (tried one by one with onnxruntime 1.32): it then reads and gives integers, and a Relu or Clip behind
it needs no kernel at all, because it is the end of the integers' range.

    x → Conv → Relu → MaxPool → Conv → Add(·, ·) → Relu → Gemm
    integers throughout; the sums of the last Gemm are float again

Deliberately does not know scales, zero points or dtypes: qdq.py writes those.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.linear import linears
from onnxpress.optimizers.matching import attribute, constant, name_of, only_user, optional
from onnxpress.optimizers.openvino_misread import misread

# Operators with an integer kernel of their own, whose output has a range of its own. HardSwish becomes a Mul (qdq.py). HardSigmoid has none and
# stays between two pairs: it is the gate of a product over an image (squeeze and excitation), whose kernel wants both factors as integers.
_MEASURED = ("Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool")
_GATES = ("HardSwish", "HardSigmoid")
# Operators that move numbers and so keep the range of what they read. Resize: nearest neighbours only; Pad: with zeros (qdq.py writes it).
_MOVING = (
    "MaxPool",
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "DepthToSpace",
    "Resize",
    "Pad",
)
_SEVERAL = ("Add", "Mul", "Concat")  # those that read more than one tensor


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A Conv, ConvTranspose, MatMul or Gemm with constant weights.

    channel_axis: of the weight, the axis of output channels. output_axis: of the output. bias: initializer (channels,) or None; that
    of a MatMul is added by another node. output: after the bias.
    """

    name: str
    node: ir.Node
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    output: ir.Value
    channel_axis: int
    output_axis: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """layers and between: the nodes that compute with 8-bit numbers.

    owners: every value to quantize → the value whose range it has. integer: those of them that an integer kernel gives, which
    everybody reads quantized. readers: (node, input) that read the others quantized.
    """

    layers: tuple[Layer, ...]
    between: tuple[ir.Node, ...]
    owners: dict[ir.Value, ir.Value]
    integer: frozenset[ir.Value]
    readers: frozenset[tuple[ir.Node, int]]

    def touched(self) -> tuple[str, ...]:
        """Names by which places can be kept in float."""
        return tuple(dict.fromkeys([layer.name for layer in self.layers] + [name_of(node) for node in self.between]))


def layers(graph: Graph, keep: Collection[str], *, transposed_convolutions: bool) -> tuple[Layer, ...]:
    """The layers of the main graph that are not to be kept in float, in order."""
    found = {id(layer.node): layer for layer in _linear_layers(graph)}
    for node in graph.model.graph:
        if node.domain == "" and (
            node.op_type == "Conv" or (node.op_type == "ConvTranspose" and transposed_convolutions)
        ):
            layer = _convolution(node)
            if layer is not None:
                found[id(node)] = layer
    ordered = [found[id(node)] for node in graph.model.graph if id(node) in found]
    return tuple(layer for layer in ordered if layer.name not in keep and _is_computed(layer.x))


def plan_chained(graph: Graph, keep: Collection[str]) -> Plan:
    """For ONNX Runtime's CPU provider, whose kernels are integer ones where both what they read and what they give is quantized."""
    chosen = layers(graph, keep, transposed_convolutions=False)
    by_node = {layer.node: layer for layer in chosen}
    read = {layer.x for layer in chosen}
    integer: dict[ir.Value, ir.Value] = {}  # value → whose range it has
    between: list[ir.Node] = []
    for node in graph.model.graph:
        if node in by_node:
            if node.op_type == "Conv":
                output = _after_activation(node.outputs[0])
                integer[output] = output
        elif node.domain == "" and name_of(node) not in keep and _has_kernel(node):
            sources = [node.inputs[index] for index in _data_inputs(node)]
            if all(source is not None and (source in integer or source in read) for source in sources):
                between.append(node)
                first = sources[0]
                assert first is not None
                output = node.outputs[0] if node.op_type in _MOVING else _after_activation(node.outputs[0])
                integer[output] = integer.get(first, first) if node.op_type in _MOVING else output
    needed = set(read)
    kept: list[ir.Node] = []
    for node in reversed(between):  # what no layer reads in the end stays in float
        output = node.outputs[0] if node.op_type in _MOVING else _after_activation(node.outputs[0])
        if output in needed:
            kept.append(node)
            needed.update(source for index in _data_inputs(node) if (source := node.inputs[index]) is not None)
        elif output in integer:
            del integer[output]
    kept.reverse()
    readers = {(layer.node, 0) for layer in chosen} | {(node, index) for node in kept for index in _data_inputs(node)}
    owners = {value: integer.get(value, value) for value in (*integer, *needed)}
    return Plan(
        layers=chosen,
        between=tuple(kept),
        owners=owners,
        integer=frozenset(integer),
        readers=frozenset(readers),
    )


def plan_inputs(graph: Graph, keep: Collection[str], *, wary: bool) -> Plan:
    """For compilers: what layers read, and of a sum behind a convolution the other summand, which is fused with it.

    wary: QdqForm; also the convolution's own summand, where layers read the sum, and what is joined or pooled for layers alone.
    """
    chosen = layers(graph, keep, transposed_convolutions=True)
    if wary:
        chosen = tuple(layer for layer in chosen if not misread(layer.x, layer.node))
    convolutions = {layer.output for layer in chosen if layer.node.op_type == "Conv"}
    readers = {(layer.node, 0) for layer in chosen}
    owners = {layer.x: layer.x for layer in chosen}
    if wary:
        _share_joined(graph, owners, readers)
    sums: list[ir.Node] = []
    for node in graph.model.graph:
        if node.op_type != "Add" or node.domain != "" or name_of(node) in keep:
            continue
        for one, other in ((0, 1), (1, 0)):
            convolved, residual = node.inputs[one], node.inputs[other]
            if convolved not in convolutions or residual is None or not _is_computed(residual):
                continue
            if not (wary and misread(residual)):
                readers.add((node, other))
                owners.setdefault(residual, residual)
                if wary and convolved is not None and _after_activation(node.outputs[0]) in owners:
                    readers.add((node, one))
                    owners.setdefault(convolved, convolved)
                sums.append(node)
                break
    if wary:
        _pool_integers(graph, owners, readers)
    return Plan(layers=chosen, between=tuple(sums), owners=owners, integer=frozenset(), readers=frozenset(readers))


def _share_joined(graph: Graph, owners: dict[ir.Value, ir.Value], readers: set[tuple[ir.Node, int]]) -> None:
    """Quantize the parts of what layers alone read with the whole's range, so that integers are joined."""
    for node in reversed(graph.model.graph):
        whole = node.outputs[0]
        if node.op_type != "Concat" or node.domain != "" or whole not in owners or whole.is_graph_output():
            continue
        parts = [value for value in node.inputs if value is not None]
        if all((use.node, use.idx) in readers for use in whole.uses()) and all(map(_is_computed, parts)):
            owners |= dict.fromkeys(parts, owners[whole])
            readers |= {(node, place) for place in range(len(node.inputs))}


def _pool_integers(graph: Graph, owners: dict[ir.Value, ir.Value], readers: set[tuple[ir.Node, int]]) -> None:
    """Quantize what windows' maxima are taken of, if layers alone read them: the maximum's code is the codes' maximum, so
    that nothing is lost by it, and `keep` not asked.
    """
    for node in reversed(graph.model.graph):
        x, maximum = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "MaxPool" or node.domain != "" or maximum not in owners or len(node.outputs) > 1:
            continue
        if x is None or only_user(x, "MaxPool") is None or maximum.is_graph_output() or not _is_computed(x):
            continue
        if all((use.node, use.idx) in readers for use in maximum.uses()):
            owners[x] = owners[maximum]
            readers.add((node, 0))


def _linear_layers(graph: Graph) -> Iterator[Layer]:
    for linear in linears(graph):
        if linear.weight.is_graph_input() or (linear.bias is not None and linear.bias.is_graph_input()):
            continue
        yield Layer(
            name=linear.name,
            node=linear.product,
            x=linear.x,
            weight=linear.weight,
            bias=linear.bias,
            output=linear.output,
            channel_axis=0 if linear.transposed else 1,
            output_axis=-1,
        )


def _convolution(node: ir.Node) -> Layer | None:
    x, weight = node.inputs[0], node.inputs[1]
    bias = optional(node, 2)
    if x is None or weight is None or not _is_float_constant(weight) or not (bias is None or _is_float_constant(bias)):
        return None
    transposed = node.op_type == "ConvTranspose"
    if transposed and attribute(node, "group", 1) != 1:
        return None  # its output channels are spread over two axes of the weight
    return Layer(
        name=name_of(node),
        node=node,
        x=x,
        weight=weight,
        bias=bias,
        output=node.outputs[0],
        channel_axis=1 if transposed else 0,
        output_axis=1,
    )


def _is_float_constant(value: ir.Value) -> bool:
    return (
        value.is_initializer()
        and not value.is_graph_input()
        and value.dtype == ir.DataType.FLOAT
        and value.const_value is not None
    )


def _is_computed(value: ir.Value) -> bool:
    return value.dtype in (None, ir.DataType.FLOAT) and (value.producer() is not None or value.is_graph_input())


def _has_kernel(node: ir.Node) -> bool:
    if node.op_type == "Resize":
        cropping = (
            attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
        )  # numbers of its own
        return bool(attribute(node, "mode", "nearest") == "nearest") and not cropping
    if node.op_type == "Pad":  # an attribute before opset 11
        value = optional(node, 2)
        zero = value is None or ((array := constant(value)) is not None and not array.any())
        return zero and 1 < len(node.inputs) < 4 and bool(attribute(node, "mode", "constant") == "constant")
    if node.op_type == "MaxPool":
        return len(node.outputs) == 1  # with indices there is none
    return node.op_type in (*_MEASURED, *_GATES, *_MOVING)


def _data_inputs(node: ir.Node) -> range:
    return range(len(node.inputs) if node.op_type in _SEVERAL else 1)


def _after_activation(value: ir.Value) -> ir.Value:
    """The value behind a Relu, or a Clip of constants, where nothing else reads what is before it."""
    user = only_user(value, "Relu", "Clip")
    if user is None or any(bound is not None and constant(bound) is None for bound in user.inputs[1:]):
        return value
    return user.outputs[0] if user.inputs[0] is value else value
