"""Finds the layers of a transformer's graph, and takes some of them out.

    h1 = layer(h0), h2 = layer(h1), h3 = layer(h2)   →   h1 = layer(h0), h3 = layer(h1)

A layer begins at a place where one value alone carries everything on, ahead of an attention operator, and ends where the next one
begins. Nothing is known by name, so that any exporter's graph will do, as long as its attention is fused.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxpress.graph import Graph
from onnxpress.optimizers.dependencies import attention_heads
from onnxpress.optimizers.edits import drop_unused_constants, replace_value
from onnxpress.optimizers.matching import dimension, rank


@dataclass(frozen=True, kw_only=True)
class Layer:
    """before and after: (batch, length, hidden); the nodes between them, and the names of the constants that these read."""

    before: ir.Value
    after: ir.Value
    nodes: tuple[ir.Node, ...]

    def constants(self) -> frozenset[str]:
        """Names of the initializers that nodes of this layer, and no others, read."""
        inside = set(self.nodes)
        return frozenset(
            str(value.name)
            for node in self.nodes
            for value in node.inputs
            if value is not None and value.is_initializer() and all(use.node in inside for use in value.uses())
        )


def find_layers(graph: Graph) -> tuple[Layer, ...]:
    """The layers in order; empty where they cannot be told apart."""
    nodes = list(graph.model.graph)
    attentions = [index for index, node in enumerate(nodes) if attention_heads(node) is not None]
    if not attentions:
        return ()
    cuts: list[tuple[int, ir.Value]] = []  # index of the last node before, and what alone goes on from there
    places = {node: index for index, node in enumerate(nodes)}
    width = _hidden_width(nodes, attentions[0])
    open_until: dict[ir.Value, int] = {}
    for index, node in enumerate(nodes):
        open_until = {value: end for value, end in open_until.items() if end > index}
        for value in node.outputs:
            if (rank(value) or 0) >= 2 and dimension(value, -1) == width:
                ends = [places.get(use.node, len(nodes)) for use in value.uses()]
                open_until[value] = len(nodes) if value.is_graph_output() else max(ends, default=index)
        alive = [value for value, end in open_until.items() if end > index]
        if len(alive) == 1 and rank(alive[0]) == 3 and alive[0] in node.outputs:
            cuts.append((index, alive[0]))
    begins = [max((at for at, (index, _) in enumerate(cuts) if index < place), default=-1) for place in attentions]
    steps = {later - earlier for earlier, later in itertools.pairwise(begins)}
    if -1 in begins or len(steps) != 1 or min(steps) < 1 or begins[-1] + min(steps) >= len(cuts):
        return ()
    step = steps.pop()
    layers = tuple(
        Layer(
            before=cuts[begin][1],
            after=cuts[begin + step][1],
            nodes=tuple(nodes[cuts[begin][0] + 1 : cuts[begin + step][0] + 1]),
        )
        for begin in begins
    )
    # A layer that answers for one of the tokens alone (select-early) is not to be replaced by what it reads.
    alike = all((dimension(layer.before, 1) == 1) == (dimension(layer.after, 1) == 1) for layer in layers)
    return layers if alike else ()


def drop_layers(graph: Graph, layers: Sequence[Layer]) -> None:
    """Take layers out. Keys and values that only they read and gave go from the graph's inputs, outputs and signature."""
    body = graph.model.graph
    gone = {node for layer in layers for node in layer.nodes}
    for layer in sorted(layers, key=lambda layer: list(body).index(layer.nodes[0]), reverse=True):
        replace_value(graph, layer.after, layer.before)
    for output in [value for value in body.outputs if value.producer() in gone]:
        body.outputs.remove(output)
    for value in [value for value in body.inputs if value.uses() and all(use.node in gone for use in value.uses())]:
        body.inputs.remove(value)
    RemoveUnusedNodesPass()(graph.model)
    drop_unused_constants(graph)
    inputs, outputs = {value.name for value in body.inputs}, {value.name for value in body.outputs}
    graph.signature = dataclasses.replace(
        graph.signature,
        inputs=tuple(spec for spec in graph.signature.inputs if spec.name in inputs),
        outputs=tuple(spec for spec in graph.signature.outputs if spec.name in outputs),
    )


def _hidden_width(nodes: Sequence[ir.Node], attention: int) -> int | None:
    """The width of what is added to after an attention operator."""
    value = nodes[attention].outputs[0]
    for node in nodes[attention + 1 :]:
        if value in node.inputs:
            value = node.outputs[0]
            others = [item for item in node.inputs if item is not None and not item.is_initializer()]
            if node.op_type == "Add" and len(others) == 2:
                width = dimension(value, -1)
                return width if isinstance(width, int) else None
    return None
