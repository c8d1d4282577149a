"""int8 linear layers with calibrated activation scales, and int8 embedding tables.

    y = MatMul(x, w) + b   →   y = MatMulIntegerToFloat(QuantizeLinear(x), w8, scales, b)

Weights are symmetric 8-bit integers with one scale an output channel; activations are uint8 with one scale and zero
point for the tensor, measured on calibration inputs, so an answer does not depend on what else is in its batch. Layers that
read one tensor share its QuantizeLinear. Embedding tables become GatherBlockQuantized, and an output layer that
shares its weight with such a table reads the same bytes through MatMulNBits. Experts become QMoE with weights in blocks (experts.py),
whose kernel finds the scales of its activations itself.

Not for convolutions, and not for weights without calibration data: `int8-dynamic` needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.calibrated_range import PERCENTILE, check_method, chosen_range
from onnxpress.optimizers.edits import add_constant, drop_unused_constants, insert_behind, unused_name
from onnxpress.optimizers.experts import quantize_experts, routers
from onnxpress.optimizers.linear import Linear, convolutions_left, linears, replace, stacked_left
from onnxpress.optimizers.opset import raise_opset
from onnxpress.optimizers.rounding import activation_uint8, blocks, rounded_uint8
from onnxpress.optimizers.smooth import check_smooth, smooth_norms
from onnxpress.optimizers.weights import Weights8Bit, quantize_embeddings


@dataclass(frozen=True, kw_only=True)
class Int8:
    """Static int8. minimum_elements: weights smaller than this stay in float.

    calibration, percentile: how ranges of activations are chosen (calibrated_range.py). smooth: exponent of SmoothQuant for layers
    behind a norm (smooth.py), 0 is off.
    """

    name: ClassVar[str] = "int8"
    lossless: ClassVar[bool] = False

    minimum_elements: int = 1024
    calibration: str = "min-max"
    percentile: float = PERCENTILE
    smooth: float = 0.0

    def __post_init__(self) -> None:
        check_method(self.name, self.calibration, self.percentile)
        check_smooth(self.name, self.smooth)

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Quantize every linear layer, embedding table and mixture of experts but those in `context.keep`.

        Raises RecipeError when the context has no calibration data.
        """
        if context.observe is None:
            raise RecipeError(
                "The pass int8 needs calibration inputs to measure activation ranges, and none are at hand: choose the "
                "pass int8-dynamic, which needs none."
            )
        raise_opset(graph, 10)  # QuantizeLinear
        smoothed = smooth_norms(graph, context.observe, self.smooth) if self.smooth else ()
        left = convolutions_left(graph) + stacked_left(graph)
        tied, touched = quantize_embeddings(graph, bits=8, preferred_block=128, keep=context.keep)
        kept = context.keep | routers(graph)
        layers = [
            layer
            for layer in linears(graph)
            if layer.name not in kept
            and layer.x.const_value is None  # else there is nothing to observe
            and layer.weight.const_value is not None
            and layer.weight.const_value.size >= self.minimum_elements
        ]
        names = sorted({str(layer.x.name) for layer in layers})
        ranges = self._ranges(graph, names, context)
        quantized: dict[str, tuple[ir.Value, ir.Value, ir.Value]] = {}
        for layer in layers:  # all before any is replaced, whose output another may read
            name = str(layer.x.name)
            if name not in quantized:
                quantized[name] = _quantize_activation(graph, layer.x, *ranges[name])
        weights = Weights8Bit(graph, limit=context.target.qdq.weight_limit)
        for layer, name in [(layer, str(layer.x.name)) for layer in layers]:
            _quantize_layer(graph, layer, quantized[name], weights.of(layer))
        experts = quantize_experts(graph, blocks, bits=8, preferred_block=128, keep=context.keep, target=context.target)
        drop_unused_constants(graph)
        graph.model.graph.opset_imports.setdefault("com.microsoft", 1)
        touched += (*(layer.name for layer in layers), *experts.touched)
        notes = (f"{len(layers)} linear layers, {len(quantized)} activation scales, {tied.tables} embedding tables",)
        return PassResult(
            graph=graph,
            changes=len(touched),
            notes=notes + tied.notes + experts.notes + left + smoothed,
            touched=touched,
        )

    def _ranges(self, graph: Graph, names: list[str], context: PassContext) -> dict[str, tuple[float, float]]:
        """What the integers of each activation cover."""
        assert context.observe is not None
        if self.calibration == "min-max":
            seen = context.observe(graph, names)
            return {name: (float(seen[name].low.min()), float(seen[name].high.max())) for name in names}
        assert context.distributions is not None
        counted = context.distributions(graph, names, counted=True)
        return {
            name: chosen_range(counted[name], self.calibration, percentile=self.percentile, rounding=rounded_uint8)
            for name in names
        }


def _quantize_activation(graph: Graph, x: ir.Value, low: float, high: float) -> tuple[ir.Value, ir.Value, ir.Value]:
    scale_array, zero_array = activation_uint8(low, high)
    scale = add_constant(graph, f"{x.name}_scale", scale_array)
    zero_point = add_constant(graph, f"{x.name}_zero_point", zero_array)
    node = ir.node("QuantizeLinear", [x, scale, zero_point], name=f"{x.name}_quantize")
    node.outputs[0].name = unused_name(graph.model.graph, f"{x.name}_uint8")
    node.outputs[0].shape, node.outputs[0].type = x.shape, ir.TensorType(ir.DataType.UINT8)
    insert_behind(graph, x, [node])
    return node.outputs[0], scale, zero_point


def _quantize_layer(
    graph: Graph,
    layer: Linear,
    activation: tuple[ir.Value, ir.Value, ir.Value],
    integers: tuple[ir.Value, ir.Value, ir.Value],
) -> None:
    x, x_scale, x_zero_point = activation
    weight, weight_scale, zero_point = integers
    inputs = [x, weight, x_scale, weight_scale, x_zero_point, zero_point]
    if layer.bias is not None:
        inputs.append(layer.bias)
    node = ir.node("MatMulIntegerToFloat", inputs, domain="com.microsoft", name=layer.name)
    replace(graph, layer, [node])
