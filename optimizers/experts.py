"""Mixtures of experts with weights of 8 or 4 bits, in blocks along the input axis.

    y = MoE(x, routing, gate_up, down)   →   y = QMoE(x, routing, blocks and scales of both)

Only the experts that a step's tokens have chosen are read, so that decoding is bound by few of the bytes. Blocks are symmetric, and one
size holds for both products. Steps of many tokens are as fast with 4 bits as with 8 (docs/decisions/0020).

The layer that routes stays as it is: it is small, and its rounding would send tokens to other experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxpress.graph import Graph
from onnxpress.optimizers.edits import add_constant, replace_node
from onnxpress.optimizers.linear import Linear, linears
from onnxpress.optimizers.matching import attribute, dimension, name_of
from onnxpress.optimizers.rounding import Blocks, Float, block_size_for
from onnxpress.optimizers.targets import Target

Rounder = Callable[..., Blocks]  # (weight (out, in), *, bits, block_size)

_ROUTING = 1  # among the inputs of MoE
_MOST_EXPERTS = 1024  # of more, words for instance, a TopK may choose for another end
# What is computed with the answers of a layer that routes.
_ROUTES = frozenset({
    "Add", "Cast", "Clip", "Concat", "Div", "Expand", "Gather", "GatherElements", "Identity", "Mul", "Neg", "Pow", "ReduceMax", "ReduceSum",
    "Reshape", "ScatterElements", "Sigmoid", "Slice", "Softmax", "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "TopK", "Transpose",
    "Unsqueeze", "Where",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RoundedExperts:
    """Names of the mixtures that were quantized, and remarks."""

    touched: tuple[str, ...]
    notes: tuple[str, ...]


def mixtures(graph: Graph) -> Iterator[ir.Node]:
    """The operators of the main graph that compute experts in floating point, with constant weights."""
    for node in list(graph.model.graph):
        if node.op_type == "MoE" and node.domain == "com.microsoft":
            weights = [node.inputs[place] for place in (2, 4)]
            if all(value is not None and value.is_initializer() for value in weights):
                yield node


def routers(graph: Graph) -> frozenset[str]:
    """Names of the linear layers that choose experts: what goes into their operator or, where it is none, into a TopK."""
    layers = {layer.output: layer for layer in linears(graph)}
    of_operators = _nearest(layers, [node.inputs[_ROUTING] for node in mixtures(graph)])
    of_choices = _nearest(
        layers, [node.inputs[0] for node in graph.model.graph if node.op_type == "TopK"], through=_ROUTES
    )
    few = {layer for layer in of_choices if dimension(layer.output, -1) in range(_MOST_EXPERTS + 1)}
    return frozenset(layer.name for layer in of_operators | few)


def _nearest(
    layers: Mapping[ir.Value, Linear], ahead: list[ir.Value | None], through: Container[str] | None = None
) -> set[Linear]:
    """The linear layers that are met first on the way back from values. through: operators that the way may lead through; None: any."""
    seen: set[ir.Value] = set()
    found = set()
    while ahead:
        value = ahead.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if value in layers:
            found.add(layers[value])
        elif producer is not None and (through is None or producer.op_type in through):
            ahead.extend(producer.inputs)
    return found


def quantize_experts(
    graph: Graph,
    rounder: Rounder,
    *,
    bits: int,
    preferred_block: int,
    target: Target,
    keep: frozenset[str] = frozenset(),
    kept_bits: int | None = None,
) -> RoundedExperts:
    """Quantize the experts of every mixture. What is in `keep` has kept_bits, or stays in float where that is None."""
    touched: list[str] = []
    notes: list[str] = []
    if target.providers != ("cpu",):
        count = len(list(mixtures(graph)))
        untried = (f"{count} mixtures of experts stay in float: QMoE has been tried on CPUs alone",) if count else ()
        return RoundedExperts(touched=(), notes=untried)
    for node in mixtures(graph):
        name = name_of(node)
        wanted = kept_bits if name in keep else bits
        if wanted is None:
            continue
        x, routing, gate_up, gate_up_bias, down, down_bias = (*node.inputs, None, None)[:6]
        assert gate_up is not None
        assert down is not None
        assert gate_up.shape is not None
        assert down.shape is not None
        widths = (gate_up.shape.numpy()[2], down.shape.numpy()[2])
        size = block_size_for(math.gcd(*widths), preferred=preferred_block)
        if size is None:
            notes.append(f"{name}: no block size divides its input widths {widths[0]} and {widths[1]}; kept in float")
            continue
        if not attribute(node, "normalize_routing_weights", 0) or len(node.inputs) > 6:
            notes.append(f"{name}: its routing or its third product has no quantized form on CPUs; kept in float")
            continue
        rounded = [_blocks(graph, value, rounder, bits=wanted, block_size=size) for value in (gate_up, down)]
        new = ir.node(
            "QMoE",
            [x, routing, *rounded[0], gate_up_bias, *rounded[1], down_bias],
            {
                **{key: value.value for key, value in node.attributes.items()},
                "expert_weight_bits": wanted,
                "block_size": size,
                "weights_prepacked": 0,
                "accuracy_level": 4,
            },
            domain="com.microsoft",
            name=name,
        )
        replace_node(graph, node, new)
        touched.append(name)
    summary = (f"{len(touched)} mixtures of experts at {bits} bits, their routing in float",) if touched else ()
    return RoundedExperts(touched=tuple(touched), notes=(*summary, *notes))


def _blocks(
    graph: Graph, weight: ir.Value, rounder: Rounder, *, bits: int, block_size: int
) -> tuple[ir.Value, ir.Value]:
    """Blocks (experts, out, in · bits / 8) and scales (experts, out, in / block_size) of weights (experts, out, in)."""
    assert weight.const_value is not None
    array = weight.const_value.numpy()
    experts, out, width = array.shape
    packed = np.empty((experts, out, width * bits // 8), np.uint8)
    scales = np.empty((experts, out, width // block_size), np.float32)
    for number, expert in enumerate(array):
        one: Float = np.ascontiguousarray(expert, np.float32)
        found = rounder(one, bits=bits, block_size=block_size)
        packed[number], scales[number] = found.packed.reshape(out, -1), found.scales
    return add_constant(graph, f"{weight.name}_blocks", packed), add_constant(graph, f"{weight.name}_scales", scales)
