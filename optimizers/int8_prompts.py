"""Steps of many tokens, prompts above all, read int8 copies of weights in blocks; steps of few tokens go on as before.

    y = MatMulNBits(x, blocks)   →   y = If(the step has many tokens; DynamicQuantizeMatMul(x, w8), MatMulNBits(x, blocks))

Decoding is bound by the bytes of the weights, a prompt by multiplications. One If holds the layers from the first such product to
the last, twice; what comes before and after them, the embedding table and the output layer, is there once. Mixtures of experts are there
once too, between one If and the next: while it opens a file, ONNX Runtime packs the weights of each branch anew. The int8 copies are what
the blocks stand for, so that prompts and decoding see the same model but for the rounding of activations.

The scale of an activation is one for all tokens of a step, as in int8-dynamic. Steps with padding read the blocks: attention leaves
whatever was in memory there, which must not decide the scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.deduplicate import merge_constants
from onnxpress.optimizers.edits import add_constant, replace_value, unused_name
from onnxpress.optimizers.matching import attribute, optional
from onnxpress.optimizers.rounding import Blocks, Float, per_channel_8bit, unpack

# Of weights: two products with 8 unsigned bits fit into 16. Session's switch for CPUs without VNNI does not reach into an If.
_LIMIT = 63
_MIXTURES = ("MoE", "QMoE")
_TOKENS, _LENGTHS, _ANSWERS = "input_ids", "lengths", "logit_indices"  # inputs of language models


@dataclass(frozen=True, kw_only=True)
class Int8Prompts:
    """from_tokens: the smallest step, in tokens of all rows, that takes the int8 weights."""

    name: ClassVar[str] = "int8-prompts"
    lossless: ClassVar[bool] = False

    from_tokens: int = 8

    def __post_init__(self) -> None:
        if self.from_tokens < 2:
            raise RecipeError(f"from_tokens is 2 or more, not {self.from_tokens}: single tokens read the blocks.")

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Give every product in blocks but those in `context.keep` and the output layer an int8 copy.

        Raises RecipeError for a graph that is no language model's.
        """
        body = graph.model.graph
        inputs = {value.name: value for value in body.inputs}
        if not inputs.keys() >= {_TOKENS, _LENGTHS, _ANSWERS}:
            raise RecipeError(f"The pass {self.name} is for language models; it goes by the tokens of their steps.")
        nodes = list(body)
        answering = _readers_of(inputs[_ANSWERS], nodes)  # rows of these are answers, few in prompts too
        products = [node for node in nodes if node.op_type == "MatMulNBits" and node not in answering]
        chosen = [node for node in products if node.name not in context.keep]
        if not chosen:
            return PassResult(graph=graph, changes=0)
        regions = _regions(nodes, products, chosen)
        for node in itertools.chain(*regions):
            if node in answering:
                raise RecipeError(
                    f"The pass {self.name} does not suit this graph: layers follow on the choice of answers."
                )
            if any(item.type == ir.AttributeType.GRAPH for item in node.attributes.values()):
                raise RecipeError(
                    f"The pass {self.name} does not suit this graph: its layers hold graphs of their own."
                )
        steps = self._has_many_tokens(graph, inputs[_TOKENS], inputs[_LENGTHS])
        body.insert_before(regions[0][0], steps)
        for number, region in enumerate(regions):
            _choose(graph, region, chosen, steps[-1].outputs[0], name=f"layers_{number}" if number else "layers")
        merge_constants(body)  # weights that layers share
        notes = (f"{len(chosen)} of {len(products)} products in int8 from {self.from_tokens} tokens a step on",)
        touched = tuple(str(node.name) for node in chosen)
        return PassResult(graph=graph, changes=len(chosen), notes=notes, touched=touched, kept_as="in blocks")

    def _has_many_tokens(self, graph: Graph, ids: ir.Value, lengths: ir.Value) -> list[ir.Node]:
        """Nodes of which the last says whether a step has from_tokens tokens or more, and no padding."""
        least = add_constant(graph, "step_tokens_least", np.array(self.from_tokens, np.int64))
        size = ir.node("Size", [ids])
        counts = ir.node("Cast", [lengths], {"to": ir.DataType.INT64})
        real = ir.node("ReduceSum", counts.outputs, {"keepdims": 0})
        full = ir.node("Equal", [size.outputs[0], real.outputs[0]])
        many = ir.node("GreaterOrEqual", [size.outputs[0], least])
        both = ir.node("And", [full.outputs[0], many.outputs[0]])
        nodes = [size, counts, real, full, many, both]
        for node in nodes:
            node.name = f"step_{node.op_type.lower()}"
            node.outputs[0].name = unused_name(graph.model.graph, node.name)
        return nodes


def _regions(
    nodes: Sequence[ir.Node], products: Sequence[ir.Node], chosen: Sequence[ir.Node]
) -> list[Sequence[ir.Node]]:
    """The nodes from the first product to the last, between two mixtures of experts, where some of them are chosen."""
    places = {node: place for place, node in enumerate(nodes)}
    mixtures = [places[node] for node in nodes if node.op_type in _MIXTURES and node.domain == "com.microsoft"]
    found: list[Sequence[ir.Node]] = []
    for start, end in itertools.pairwise((-1, *mixtures, len(nodes))):
        within = [places[node] for node in products if start < places[node] < end]
        if any(start < places[node] < end for node in chosen):
            found.append(nodes[within[0] : within[-1] + 1])
    return found


def _choose(
    graph: Graph, region: Sequence[ir.Node], chosen: Sequence[ir.Node], condition: ir.Value, *, name: str
) -> None:
    """Put an If in the place of nodes: with the chosen products in int8, or as they are."""
    body = graph.model.graph
    int8 = {node: _int8(graph, node) for node in region if node in chosen}
    outputs = [value for node in region for value in node.outputs if _leaves(value, region)]
    branches = {
        "then_branch": _branch(region, outputs, "many", int8),
        "else_branch": _branch(region, outputs, "few", {}),
    }
    choice = ir.node("If", [condition], branches, num_outputs=len(outputs), name=name)
    body.insert_before(region[0], choice)
    for old, new in zip(outputs, choice.outputs, strict=True):
        before, new.shape, new.type = old.name, old.shape, old.type
        replace_value(graph, old, new)
        old.name, new.name = f"{before}_before", before
    body.remove(list(reversed(region)), safe=True)


def _int8(graph: Graph, node: ir.Node) -> list[ir.Value | None]:
    """Weight, scales and zero points of DynamicQuantizeMatMul, and the bias."""
    integers, scales, zero_points = per_channel_8bit(_weight(node).T, limit=_LIMIT)
    return [
        add_constant(graph, f"{node.name}_weight_8bit", integers),
        add_constant(graph, f"{node.name}_weight_scale", scales),
        add_constant(graph, f"{node.name}_weight_zero_point", zero_points),
        optional(node, 5),
    ]


def _weight(node: ir.Node) -> Float:
    """What the blocks of a product stand for, float32 (out, in)."""
    packed, scales, zeros = (_constant(node, place) for place in (1, 2, 3))
    assert packed is not None
    assert scales is not None
    rows: int = node.attributes["N"].as_int()
    found = Blocks(
        packed=packed,
        scales=scales.reshape(rows, -1),
        zero_points=None if zeros is None else zeros.reshape(rows, -1),
    )
    return unpack(found, bits=attribute(node, "bits", 4), block_size=node.attributes["block_size"].as_int())


def _constant(node: ir.Node, place: int) -> npt.NDArray[Any] | None:
    value = node.inputs[place] if place < len(node.inputs) else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _readers_of(value: ir.Value, nodes: Sequence[ir.Node]) -> set[ir.Node]:
    """Nodes that hang on a value, directly or not."""
    found: set[ir.Node] = set()
    values = {value}
    for node in nodes:
        if values.intersection(node.inputs):
            found.add(node)
            values.update(node.outputs)
    return found


def _leaves(value: ir.Value, region: Sequence[ir.Node]) -> bool:
    inside = set(region)
    return value.is_graph_output() or any(use.node not in inside for use in value.uses())


def _branch(
    region: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    suffix: str,
    int8: dict[ir.Node, list[ir.Value | None]],
) -> ir.Graph:
    """A copy of the nodes, with the given products in int8. It reads what is around it by name."""
    copies: dict[ir.Value, ir.Value] = {}
    nodes = []
    for node in region:
        given = [value if value is None else copies.get(value, value) for value in node.inputs]
        if node in int8:
            given = [given[0], *int8[node]]
            while given[-1] is None:
                given.pop()
            new = ir.node("DynamicQuantizeMatMul", given, domain="com.microsoft", name=f"{node.name}_{suffix}")
        else:
            new = ir.Node(
                node.domain,
                node.op_type,
                given,
                node.attributes.values(),
                num_outputs=len(node.outputs),
                name=f"{node.name}_{suffix}",
            )
        for old, value in zip(node.outputs, new.outputs, strict=True):
            value.name, value.shape, value.type = f"{old.name}_{suffix}" if old.name else old.name, old.shape, old.type
            copies[old] = value
        nodes.append(new)
    return ir.Graph([], [copies[value] for value in outputs], nodes=nodes, name=f"layers_{suffix}")
