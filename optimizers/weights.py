"""8-bit and 4-bit weights under float activations, in blocks along the input axis.

    y = MatMul(x, w) + b     →   y = MatMulNBits(x, blocks, scales, b)
    y = Gather(table, ids)   →   y = GatherBlockQuantized(blocks, ids, scales)
    y = MoE(x, routing, …)   →   y = QMoE(x, routing, blocks, scales, …)      (experts.py)

A table that is also an output layer's weight (tied weights) is stored once and read by both. The block size is the
largest power of two, up to the preferred one, that divides the input width. accuracy_level 4 lets the kernel
multiply in int8, which is 4 times faster on CPUs than level 0.

Methods: "rtn" rounds to the nearest; "gptq" and "awq" look at what calibration inputs bring to each layer, behind layers that are
rounded already (error_feedback.py); "awq-gptq" does both. awq scales the inputs of layers that read a norm, into whose weight the
scales go. Tables and experts are always rounded to the nearest.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult, Stream
from onnxpress.optimizers.edits import add_constant, drop_unused_constants, replace_node
from onnxpress.optimizers.error_feedback import blocks_with_feedback, channel_scales
from onnxpress.optimizers.experts import quantize_experts, routers
from onnxpress.optimizers.linear import Linear, embeddings, linears, replace, stacked_left
from onnxpress.optimizers.matching import name_of
from onnxpress.optimizers.rounding import Blocks, Float, block_size_for, blocks, per_channel_8bit

METHODS = ("rtn", "gptq", "awq", "awq-gptq")
# Constants that a norm's answers are proportional to, as places among its inputs.
_NORMS = {
    "SimplifiedLayerNormalization": (1,),
    "SkipSimplifiedLayerNormalization": (2,),
    "RMSNormalization": (1,),
    "LayerNormalization": (1, 2),
    "SkipLayerNormalization": (2, 3),
}
_SMALLEST_TABLE = 16384  # elements; below this a table's bytes do not matter


@dataclass(frozen=True, kw_only=True)
class _WeightOnly:
    """block_size: the preferred block, a power of two from 16 on. minimum_elements: smaller weights stay in float.

    method: of METHODS. search: each block's range is the one of the least squared error (docs/decisions/0011 says when it pays).
    symmetric: all zero points are the middle of the range; otherwise each block of a linear layer that shares no table has its
    own. table_bits: of embedding tables and the output layers that share them; 0 is as many as elsewhere.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = False
    bits: ClassVar[int]
    kept_bits: ClassVar[int | None] = None  # of the places in `context.keep`; None is float

    block_size: int = 128
    minimum_elements: int = 1024
    method: str = "rtn"
    search: bool = False
    symmetric: bool = True
    table_bits: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise RecipeError(f"A block size is a power of two from 16 on, not {self.block_size}.")
        if self.method not in METHODS:
            raise RecipeError(f"The pass {self.name} has the methods {', '.join(METHODS)}, not {self.method!r}.")
        if self.table_bits not in (0, 4, 8):
            raise RecipeError(f"table_bits is 4 or 8, or 0 for as many as elsewhere, not {self.table_bits}.")

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Quantize the weights of every linear layer, embedding table and mixture of experts; those in `context.keep` less, or not at all.

        Raises RecipeError where the method needs calibration inputs and the context has none.
        """
        tied, touched = quantize_embeddings(
            graph,
            bits=self.table_bits or self.bits,
            preferred_block=self.block_size,
            keep=context.keep,
            kept_bits=self.kept_bits,
            search=self.search,
        )
        left = stacked_left(graph)
        routing = routers(graph)
        experts = quantize_experts(
            graph,
            partial(blocks, search=self.search),
            bits=self.bits,
            preferred_block=self.block_size,
            keep=context.keep,
            kept_bits=self.kept_bits,
            target=context.target,
        )
        touched += experts.touched
        notes = [*tied.notes, *experts.notes, *left]
        if experts.touched and self.method != "rtn":
            notes.append(f"experts are rounded to the nearest: {self.method} does not follow which tokens reach which")
        calibrated = None if self.method == "rtn" else _Calibrated(self, graph, context)
        stored: dict[tuple[ir.Value, bool, int], tuple[ir.Value, ir.Value, ir.Value | None]] = {}
        count = scaled = finer = 0
        for layer in linears(graph):
            tensor = layer.weight.const_value
            bits = self.kept_bits if layer.name in context.keep else self.bits
            if bits is None or tensor is None or tensor.size < self.minimum_elements or layer.name in routing:
                continue
            width = tensor.shape.numpy()[1 if layer.transposed else 0]
            size = block_size_for(width, preferred=self.block_size)
            if size is None:
                notes.append(f"{layer.name}: no block size divides its input width {width}; kept in float")
                continue
            moments: Float | None = None
            if calibrated is not None and layer.x.const_value is None:
                context.progress(f"{self.method}, {layer.name}")
                scaled += calibrated.scale(layer, bits=bits, block_size=size)
                moments = calibrated.moments(layer.x) if "gptq" in self.method else None
            shared = stored.get((layer.weight, layer.transposed, bits)) if moments is None else None
            if shared is None:
                weight = np.ascontiguousarray(layer.weight_array().T)  # (out, in)
                found = self.rounded(weight, moments, bits=bits, block_size=size)
                zeros = found.zero_points
                shared = stored[layer.weight, layer.transposed, bits] = (
                    add_constant(graph, f"{layer.name}_weight_blocks", found.packed),
                    add_constant(graph, f"{layer.name}_weight_scales", found.scales),
                    None if zeros is None else add_constant(graph, f"{layer.name}_weight_zero_points", zeros),
                )
            _use_blocks(graph, layer, *shared, bits=bits, block_size=size)
            if not layer.weight.uses():  # at once: weights that were scaled are in memory, and in no file
                del graph.model.graph.initializers[str(layer.weight.name)]
                layer.weight.const_value = None
            touched += (layer.name,)
            count += bits == self.bits
            finer += bits != self.bits
        if "awq" in self.method:
            notes.append(f"{scaled} norms carry scales of the channels behind them")
        drop_unused_constants(graph)
        graph.model.graph.opset_imports.setdefault("com.microsoft", 1)
        others = f" and {finer} at {self.kept_bits}" if finer else ""
        tables = f"{tied.tables - tied.kept} embedding tables at {self.table_bits or self.bits}"
        tables += f" and {tied.kept} at {self.kept_bits}" if tied.kept else ""
        summary = f"{count} linear layers at {self.bits} bits{others}, {tables}"
        kept_as = "in float" if self.kept_bits is None else f"at {self.kept_bits} bits"
        return PassResult(graph=graph, changes=len(touched), notes=(summary, *notes), touched=touched, kept_as=kept_as)

    def rounded(self, weight: Float, moments: Float | None, *, bits: int, block_size: int) -> Blocks:
        """A weight (out, in) in blocks, with error feedback where the second moments of its inputs are given."""
        if moments is None:
            return blocks(weight, bits=bits, block_size=block_size, search=self.search, symmetric=self.symmetric)
        return blocks_with_feedback(
            weight, moments, bits=bits, block_size=block_size, search=self.search, symmetric=self.symmetric
        )


class _Calibrated:
    """What calibration inputs say about the layers of a graph that is being quantized, from its first layer to its last."""

    def __init__(self, options: _WeightOnly, graph: Graph, context: PassContext) -> None:
        if context.stream is None:
            raise RecipeError(
                f"The method {options.method} needs calibration inputs, and none are at hand: choose the method rtn."
            )
        self._options = options
        self._graph = graph
        self._stream: Stream = context.stream(graph)
        self._x: ir.Value | None = None
        self._moments: Float = np.empty((0, 0), np.float32)
        read = Counter(layer.weight for layer in linears(graph))
        self._shared = {weight for weight, count in read.items() if count > 1}  # before any is rounded

    def scale(self, layer: Linear, *, bits: int, block_size: int) -> bool:
        """Scale the inputs of a layer, and of all others that read the same, where that pays and a norm can carry it."""
        x, norm = layer.x, layer.x.producer()
        if "awq" not in self._options.method or x is self._x or norm is None or x is not norm.outputs[0]:
            return False
        readers = [other for other in linears(self._graph) if other.x is x]
        carriers = [norm.inputs[place] for place in _NORMS.get(norm.op_type, ()) if place < len(norm.inputs)]
        fixed = [carrier for carrier in carriers if carrier is not None and carrier.const_value is not None]
        of_readers = {reader.weight for reader in readers}
        if (
            x.is_graph_output()
            or len(x.uses()) != len(readers)
            or not fixed
            or len(fixed) != len(carriers)
            or of_readers & self._shared
            or any(len(weight.uses()) > 1 or weight.is_graph_output() for weight in of_readers)
        ):
            return False
        weights = np.concatenate([reader.weight_array().T for reader in readers])
        rounder = partial(self._options.rounded, moments=None, bits=bits, block_size=block_size)
        scales = channel_scales(weights, self.moments(x), rounder, bits=bits, block_size=block_size)
        if scales is None:
            return False
        for reader in readers:
            weight = reader.weight_array() * scales[:, None]
            reader.weight.const_value = ir.tensor(weight.T if reader.transposed else weight, name=reader.weight.name)
        for place, carrier in zip(_NORMS[norm.op_type], fixed, strict=False):
            assert carrier.const_value is not None
            new = add_constant(self._graph, f"{carrier.name}_scaled", carrier.const_value.numpy() / scales)
            norm.replace_input_with(place, new)
        self._stream.divide(x, scales)
        self._moments = self._moments / np.outer(scales, scales)
        return True

    def moments(self, x: ir.Value) -> Float:
        """Second moments of a layer's inputs; those of the layer before where it reads the same."""
        if x is not self._x:
            self._moments, self._x = self._stream.second_moments(x), x
        return self._moments


@dataclass(frozen=True, kw_only=True)
class WeightsInt8(_WeightOnly):
    """8-bit weights."""

    name: ClassVar[str] = "int8-weights"
    bits: ClassVar[int] = 8


@dataclass(frozen=True, kw_only=True)
class WeightsInt4(_WeightOnly):
    """4-bit weights; smaller blocks, since 16 levels leave more to lose. Where that is too much, 8 bits."""

    name: ClassVar[str] = "int4-weights"
    bits: ClassVar[int] = 4
    kept_bits: ClassVar[int | None] = 8

    block_size: int = 32


class Weights8Bit:
    """Weights of linear layers as signed integers with a scale a channel, each once for all layers that share it."""

    def __init__(self, graph: Graph, *, limit: int) -> None:
        self._graph, self._limit = graph, limit
        self._stored: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value, ir.Value]] = {}

    def of(self, layer: Linear) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Integers (in, out), scales and zero points (out,)."""
        key = (layer.weight, layer.transposed)
        if key not in self._stored:
            integers, scales, zero_points = per_channel_8bit(layer.weight_array(), limit=self._limit)
            self._stored[key] = (
                add_constant(self._graph, f"{layer.name}_weight_8bit", integers),
                add_constant(self._graph, f"{layer.name}_weight_scale", scales),
                add_constant(self._graph, f"{layer.name}_weight_zero_point", zero_points),
            )
        return self._stored[key]


@dataclass(frozen=True, kw_only=True)
class TiedTables:
    """How many tables were quantized, how many of them to `kept_bits`, and remarks."""

    tables: int
    kept: int
    notes: tuple[str, ...]


def quantize_embeddings(
    graph: Graph,
    *,
    bits: int,
    preferred_block: int,
    keep: frozenset[str],
    kept_bits: int | None = None,
    search: bool = False,
) -> tuple[TiedTables, tuple[str, ...]]:
    """Quantize the embedding tables, and the linear layers that share a weight with one. Returns touched names.

    What is in `keep` stays in float; or, where kept_bits is given, the whole table has so many bits, for all who read it.
    """
    touched: list[str] = []
    notes: list[str] = []
    stored: dict[str, tuple[ir.Value, ir.Value, int, int]] = {}
    readers: dict[str, set[str]] = {}
    for node in embeddings(graph, minimum_elements=_SMALLEST_TABLE):
        readers.setdefault(_name_of(node.inputs[0]), set()).add(node.name or _name_of(node.outputs[0]))
    for layer in linears(graph):
        if layer.transposed and layer.weight.name in readers:
            readers[str(layer.weight.name)].add(layer.name)
    for node in embeddings(graph, minimum_elements=_SMALLEST_TABLE):
        name = name_of(node)
        table = node.inputs[0]
        if (name in keep and kept_bits is None) or table is None or table.const_value is None:
            continue
        width = table.const_value.shape.numpy()[1]
        size = block_size_for(width, preferred=preferred_block)
        if size is None:
            notes.append(f"{name}: no block size divides its width {width}; kept in float")
            continue
        key = str(table.name)
        if key not in stored:
            array = table.const_value.numpy().astype(np.float32)  # (rows, width)
            wanted = kept_bits if kept_bits is not None and readers[key] & keep else bits
            found = blocks(array, bits=wanted, block_size=size, search=search)
            rows = add_constant(graph, f"{key}_blocks", found.packed.reshape(len(array), -1))
            stored[key] = (rows, add_constant(graph, f"{key}_scales", found.scales), size, wanted)
        rows, scale_value, size, wanted = stored[key]
        new = ir.node(
            "GatherBlockQuantized",
            [rows, node.inputs[1], scale_value],
            {"gather_axis": 0, "quantize_axis": 1, "block_size": size, "bits": wanted},
            domain="com.microsoft",
            name=name,
        )
        replace_node(graph, node, new)
        touched.append(name)
    for layer in linears(graph):
        shared = stored.get(str(layer.weight.name))
        if shared is None or not layer.transposed or (layer.name in keep and kept_bits is None):
            continue
        rows, scale_value, size, wanted = shared
        assert layer.weight.const_value is not None
        out_features, width = layer.weight.const_value.shape.numpy()
        shape = add_constant(
            graph, f"{layer.name}_blocks_shape", np.array([out_features, width // size, size * wanted // 8], np.int64)
        )
        reshape = ir.node("Reshape", [rows, shape], name=f"{layer.name}_blocks_view")
        graph.model.graph.insert_before(layer.nodes[-1], reshape)
        _use_blocks(graph, layer, reshape.outputs[0], scale_value, None, bits=wanted, block_size=size)
        touched.append(layer.name)
        notes.append(f"{layer.name} shares its weight with an embedding table: stored once")
    if stored:
        graph.model.graph.opset_imports.setdefault("com.microsoft", 1)
    kept = sum(wanted == kept_bits != bits for *_, wanted in stored.values())
    return TiedTables(tables=len(stored), kept=kept, notes=tuple(notes)), tuple(touched)


def _name_of(value: ir.Value | None) -> str:
    assert value is not None
    return str(value.name)


def _use_blocks(
    graph: Graph,
    layer: Linear,
    packed: ir.Value,
    scales: ir.Value,
    zeros: ir.Value | None,
    *,
    bits: int,
    block_size: int,
) -> None:
    tensor = layer.weight.const_value
    assert tensor is not None
    in_features, out_features = tensor.shape.numpy()
    if layer.transposed:
        in_features, out_features = out_features, in_features
    inputs: list[ir.Value | None] = [layer.x, packed, scales, zeros, None, layer.bias]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {
        "K": in_features,
        "N": out_features,
        "bits": bits,
        "block_size": block_size,
        "accuracy_level": 4,
    }
    replace(graph, layer, [ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name=layer.name)])
