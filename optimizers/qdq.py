"""8-bit layers in ONNX's standard form: QuantizeLinear and DequantizeLinear around what the runtime then runs on integers.

    y = Conv(x, w, b)   →   y = Conv(DQ(Q(x)), DQ(w8), DQ(b32)), on the CPU followed by DQ(Q(·))

Activations have one scale a tensor, measured on calibration inputs; weights are symmetric, with one scale an output channel.
int8-qdq follows the target (targets.QdqForm): ONNX Runtime's CPU provider turns the pairs into QLinearConv, QLinearAdd and so on,
TensorRT's parser takes symmetric int8 with biases in float, OpenVINO compiles what layers read. On CPUs embedding tables are 8-bit blocks, as with int8. fp8-qdq is the same in FP8 E4M3, for NVIDIA GPUs from Ada on.
ONNX operators QuantizeLinear and DequantizeLinear, opset 13 (per channel) and 19 (FP8).

Not for ConvTranspose on the CPU, for which ONNX Runtime has no integer kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxpress.errors import RecipeError
from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.bias_correction import correct_biases
from onnxpress.optimizers.calibrated_range import PERCENTILE, Numbers, check_method, chosen_range
from onnxpress.optimizers.deduplicate import merge_constants
from onnxpress.optimizers.edits import (
    add_constant,
    drop_unused_constants,
    insert,
    insert_behind,
    replace_node,
    replace_value,
    unused_name,
)
from onnxpress.optimizers.experts import mixtures, routers
from onnxpress.optimizers.matching import constant, name_of, only_user, optional
from onnxpress.optimizers.openvino_forms import own_constants, respell_for_integers
from onnxpress.optimizers.openvino_misread import misread
from onnxpress.optimizers.opset import raise_opset
from onnxpress.optimizers.qdq_forms import spell_for_integers
from onnxpress.optimizers.qdq_plan import Layer, Plan, layers, plan_chained, plan_inputs
from onnxpress.optimizers.rounding import Float, activation_uint8
from onnxpress.optimizers.smooth import check_smooth, smooth_norms
from onnxpress.optimizers.targets import QdqForm
from onnxpress.optimizers.weights import quantize_embeddings
from onnxpress.optimizers.zero_points import fold_zero_points

_FP8: Literal["float8e4m3fn"] = "float8e4m3fn"
_DTYPES = {"uint8": np.dtype(np.uint8), "int8": np.dtype(np.int8), _FP8: np.dtype(ml_dtypes.float8_e4m3fn)}
_LARGEST_FP8 = 448.0
_LARGEST_BIAS = 2**30  # of an int32 bias; the sums of products need room too
_FP8_FORM = QdqForm(
    activations=_FP8, weights=_FP8, symmetric=True, weight_limit=448, integer_bias=False, chained=False, tables=False
)


@dataclass(frozen=True, kw_only=True)
class Int8Qdq:
    """calibration: how ranges of activations are chosen (calibrated_range.py). percentile: what `percentile` keeps.

    smooth: exponent of SmoothQuant for layers behind a norm (smooth.py), 0 is off. bias_correction: put the mean error of each
    layer's output into its bias.
    """

    name: ClassVar[str] = "int8-qdq"
    lossless: ClassVar[bool] = False

    calibration: str = "min-max"
    percentile: float = PERCENTILE
    smooth: float = 0.0
    bias_correction: bool = False

    def __post_init__(self) -> None:
        check_method(self.name, self.calibration, self.percentile)
        check_smooth(self.name, self.smooth)

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Quantize all but what is in `context.keep`. Raises RecipeError when the context has no calibration data."""
        return _quantize(self, graph, context, context.target.qdq)


@dataclass(frozen=True, kw_only=True)
class Fp8Qdq(Int8Qdq):
    """As int8-qdq, in FP8 E4M3."""

    name: ClassVar[str] = "fp8-qdq"

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """As int8-qdq."""
        return _quantize(self, graph, context, _FP8_FORM)


def _quantize(options: Int8Qdq, graph: Graph, context: PassContext, form: QdqForm) -> PassResult:
    if context.distributions is None or context.observe is None or context.stream is None:
        raise RecipeError(
            f"The pass {options.name} needs calibration inputs to measure activation ranges, and none are at hand: give some with "
            "`calibration`, or choose the pass int8-dynamic, which needs none."
        )
    raise_opset(graph, 19 if form.activations == _FP8 else 13)
    notes: tuple[str, ...] = ()
    if mixed := len(list(mixtures(graph))):
        notes += (
            f"{mixed} mixtures of experts stay in float; int8-dynamic and the precisions of weights quantize them",
        )
    tables: tuple[str, ...] = ()
    if form.chained:
        spell_for_integers(graph, context.keep)
    if form.wary:
        notes += respell_for_integers(graph)
    if form.tables:
        tied, tables = quantize_embeddings(graph, bits=8, preferred_block=128, keep=context.keep)
        notes += (f"{tied.tables} embedding tables", *tied.notes) if tables else tied.notes
    plan = _plan(graph, context, form)
    if form.wary:
        notes += _misread(graph, context)
    if not plan.layers:
        drop_unused_constants(graph)
        notes += (
            ("no other Conv, MatMul or Gemm with constant float32 weights is to be quantized",)
            if tables
            else ("no Conv, MatMul or Gemm has constant float32 weights",)
        )
        return PassResult(graph=graph, changes=len(tables), notes=notes, touched=tables)
    if options.smooth:
        notes += smooth_norms(graph, context.observe, options.smooth)
        plan = _plan(graph, context, form)  # its weights are others now
    original = graph.clone()
    outputs = _outputs(original, plan)
    writer = _Writer(graph, form, options, context)
    writer.write(plan)
    if options.bias_correction:
        notes += correct_biases(graph, original, outputs, plan.layers, context.stream)
    if form.integer_bias:
        for layer in plan.layers:
            writer.write_integer_bias(layer)
    if form.wary:
        fold_zero_points(graph, {layer.node for layer in plan.layers})
    drop_unused_constants(graph)
    merge_constants(graph.model.graph)  # weights that layers share
    if form.wary:
        own_constants(graph)
    kinds = sorted({layer.node.op_type for layer in plan.layers} | {node.op_type for node in plan.between})
    scales = len(set(plan.owners.values()))
    summary = f"{len(plan.layers)} layers and {len(plan.between)} nodes between ({', '.join(kinds)}), {scales} activation scales"
    touched = tables + plan.touched()
    return PassResult(graph=graph, changes=len(touched), notes=(summary, *notes), touched=touched)


def _plan(graph: Graph, context: PassContext, form: QdqForm) -> Plan:
    keep = context.keep | routers(graph)
    return plan_chained(graph, keep) if form.chained else plan_inputs(graph, keep, wary=form.wary)


def _misread(graph: Graph, context: PassContext) -> tuple[str, ...]:
    """What stays in float because of how OpenVINO would read it, for the ledger."""
    reasons = {
        layer.name: misread(layer.x, layer.node) for layer in layers(graph, context.keep, transposed_convolutions=True)
    }
    found = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    return (f"{len(found)} layers stay in float, which OpenVINO would misread: {', '.join(found)}",) if found else ()


def _outputs(copy: Graph, plan: Plan) -> dict[ir.Node, ir.Value]:
    """What each layer gives, as values of a copy of the graph; names may change from here on."""
    values = {str(value.name): value for node in copy.model.graph for value in node.outputs}
    return {layer.node: values[str(layer.output.name)] for layer in plan.layers}


class _Writer:
    """Puts the pairs into a graph."""

    def __init__(self, graph: Graph, form: QdqForm, options: Int8Qdq, context: PassContext) -> None:
        self._graph, self._form, self._options, self._context = graph, form, options, context
        self._scales: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}  # owner of a range → scale, zero point
        self._weight_scales: dict[ir.Node, Float] = {}

    def write(self, plan: Plan) -> None:
        """Quantize weights and activations; biases stay in float."""
        self._measure(plan)
        for layer in plan.layers:  # before the activations, which need to be asked for by the layers' own inputs
            self._write_weight(layer, plan.owners[layer.x])
        for value, owner in plan.owners.items():
            pair = self._pair(value, owner)
            uses = [(use.node, use.idx) for use in value.uses() if use.node is not pair[0]]
            if value in plan.integer:
                _replace_readers(uses, pair[1].outputs[0])
                if value.is_graph_output():
                    replace_value(self._graph, value, pair[1].outputs[0])
                    pair[0].replace_input_with(0, value)
            else:
                _replace_readers([use for use in uses if use in plan.readers], pair[1].outputs[0])
        for node in plan.between:
            if node.op_type == "HardSwish":
                self._write_hard_swish(node)
            elif node.op_type == "Pad":
                self._write_pad(node)

    def write_integer_bias(self, layer: Layer) -> None:
        """int32 with the product of the scales of activation and weight, which is what the sums of products have."""
        node = layer.node
        bias = optional(node, 2)
        if bias is None:
            return
        array = constant(bias)
        dequantize = node.inputs[0]
        assert array is not None
        assert dequantize is not None
        producer = dequantize.producer()
        assert producer is not None
        x_scale = constant(producer.inputs[1])
        assert x_scale is not None
        scales = (x_scale * self._weight_scales[node]).astype(np.float32)
        integers = np.rint(array.astype(np.float64) / scales).astype(np.int32)
        node.replace_input_with(2, self._constant_pair(f"{layer.name}_bias", integers, scales, axis=0, before=node))

    def _write_hard_swish(self, node: ir.Node) -> None:
        """HardSwish(x) = x · clip(x / 6 + 1/2, 0, 1) → Mul, which has an integer kernel, of x and of x quantized once more, read otherwise:
        with 6 / 254 for a step its codes end where the clip does (but for one, above 3), and stand for 0 to 1 with 1 / 254.
        """
        x, output = node.inputs[0], node.outputs[0]
        assert x is not None
        name, lowest = name_of(node), 0 if self._form.activations == "uint8" else -128
        dtype = _DTYPES[self._form.activations]
        step, middle = np.array(6 / 254, np.float32), np.array(lowest + 127, dtype)
        constants = [
            add_constant(self._graph, f"{name}_gate_{part}", array)
            for part, array in (
                ("step", step),
                ("middle", middle),
                ("scale", np.array(1 / 254, np.float32)),
                ("zero_point", np.array(lowest, dtype)),
            )
        ]
        kind = ir.DataType.from_numpy(dtype)
        codes = insert(
            node, "QuantizeLinear", [x, *constants[:2]], name=f"{name}_gate_quantized", dtype=kind, shape=x.shape
        )
        gate = insert(
            node, "DequantizeLinear", [codes, *constants[2:]], name=f"{name}_gate", dtype=output.dtype, shape=x.shape
        )
        replace_node(self._graph, node, ir.node("Mul", [x, gate], name=name))

    def _write_pad(self, node: ir.Node) -> None:
        """DQ → Pad → Q → DQ becomes Pad → DQ: ONNX Runtime has the kernel, and no rule that finds it."""
        before, after = node.inputs[0], only_user(node.outputs[0], "QuantizeLinear")
        dequantize = None if before is None else before.producer()
        assert dequantize is not None
        assert after is not None
        codes, _, zero_point = dequantize.inputs
        padded = insert(
            node,
            "Pad",
            [codes, node.inputs[1], zero_point, *node.inputs[3:]],
            name=f"{name_of(node)}_of_codes",
            dtype=after.outputs[0].dtype,
            shape=node.outputs[0].shape,
        )
        replace_value(self._graph, after.outputs[0], padded)
        self._graph.model.graph.remove([node, after], safe=True)
        if not dequantize.outputs[0].uses() and not dequantize.outputs[0].is_graph_output():
            self._graph.model.graph.remove(dequantize, safe=True)  # ONNX Runtime would run it

    def _measure(self, plan: Plan) -> None:
        owners = list(dict.fromkeys(plan.owners.values()))
        distributions = self._context.distributions
        assert distributions is not None
        method = self._options.calibration
        found = distributions(self._graph, [str(owner.name) for owner in owners], counted=method != "min-max")
        for owner in owners:
            low, high = chosen_range(
                found[str(owner.name)], method, percentile=self._options.percentile, rounding=self._rounded
            )
            if (
                all(use.node.op_type == "HardSwish" and use.node.domain == "" for use in owner.uses())
                and not owner.is_graph_output()
            ):
                low = max(low, -3.0)  # where HardSwish begins to be 0
            scale, zero_point = activation_scale(low, high, self._form)
            self._scales[owner] = (
                add_constant(self._graph, f"{owner.name}_scale", scale),
                add_constant(self._graph, f"{owner.name}_zero_point", zero_point),
            )

    def _rounded(self, numbers: Numbers, low: float, high: float) -> Numbers:
        scale, zero_point = activation_scale(low, high, self._form)
        steps = numbers / float(scale)
        if self._form.activations == _FP8:
            clipped = np.clip(steps, -_LARGEST_FP8, _LARGEST_FP8)
            return np.asarray(clipped.astype(zero_point.dtype).astype(np.float64) * float(scale))
        bounds, zero = np.iinfo(zero_point.dtype), int(zero_point)
        return np.asarray((np.clip(np.rint(steps) + zero, bounds.min, bounds.max) - zero) * float(scale))

    def _pair(self, value: ir.Value, owner: ir.Value) -> tuple[ir.Node, ir.Node]:
        scale, zero_point = self._scales[owner]
        quantize = ir.node("QuantizeLinear", [value, scale, zero_point], name=f"{value.name}_quantize")
        dequantize = ir.node(
            "DequantizeLinear", [quantize.outputs[0], scale, zero_point], name=f"{value.name}_dequantize"
        )
        for node, dtype in ((quantize, zero_point.dtype), (dequantize, ir.DataType.FLOAT)):
            assert dtype is not None
            output = node.outputs[0]
            suffix = "quantized" if node is quantize else "dequantized"
            output.name = unused_name(self._graph.model.graph, f"{value.name}_{suffix}")
            output.shape, output.type = value.shape, ir.TensorType(dtype)
        insert_behind(self._graph, value, [quantize, dequantize])
        return quantize, dequantize

    def _write_weight(self, layer: Layer, x_owner: ir.Value) -> None:
        weight = constant(layer.weight)
        x_scale = constant(self._scales[x_owner][0])
        assert weight is not None
        assert x_scale is not None
        axis, node = layer.channel_axis, layer.node
        weight = np.asarray(weight, np.float32)
        if node.op_type == "MatMul" and axis == 0:  # it stood behind a Transpose
            weight, axis = weight.T, 1
        rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)  # (channels, numbers of each)
        scales = np.abs(rows).max(axis=1, initial=0) / self._form.weight_limit
        bias = None if layer.bias is None else constant(layer.bias)
        if bias is not None and self._form.integer_bias:  # a channel of tiny weights must leave room for its bias
            scales = np.maximum(scales, np.abs(bias) / (float(x_scale) * _LARGEST_BIAS))
        tiny = np.finfo(np.float32).tiny
        scales = np.where(scales > tiny, scales, 1).astype(np.float32)
        shaped = scales.reshape([-1 if other == axis else 1 for other in range(weight.ndim)])
        self._weight_scales[node] = scales
        transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
        integers = _weight_integers(weight / shaped, self._form)
        node.replace_input_with(1, self._constant_pair(f"{layer.name}_weight", integers, scales, axis, before=node))
        if transpose is not None and not transpose.outputs[0].uses():
            self._graph.model.graph.remove(transpose, safe=True)

    def _constant_pair(
        self, name: str, integers: npt.NDArray[Any], scales: Float, axis: int, *, before: ir.Node
    ) -> ir.Value:
        """DequantizeLinear of an initializer."""
        inputs = [
            add_constant(self._graph, f"{name}_quantized", integers),
            add_constant(self._graph, f"{name}_scale", scales),
        ]
        if not self._form.wary:  # layers that share one run in floats on OpenVINO
            zero_point = np.zeros(scales.shape).astype(integers.dtype)
            inputs.append(add_constant(self._graph, f"{name}_zero_point", zero_point))
        return insert(
            before,
            "DequantizeLinear",
            inputs,
            {"axis": axis},
            name=f"{name}_dequantized",
            dtype=ir.DataType.FLOAT,
            shape=integers.shape,
        )


def activation_scale(low: float, high: float, form: QdqForm) -> tuple[Float, npt.NDArray[Any]]:
    """Scale and zero point (both shape ()) of a form that map [low, high], widened to contain 0, to its 8 bits."""
    dtype, tiny = _DTYPES[form.activations], float(np.finfo(np.float32).tiny)
    if form.symmetric:
        scale = max(-low, high, 0.0) / (_LARGEST_FP8 if form.activations == _FP8 else 127.0)
        return np.array(scale if scale > tiny else 1, np.float32), np.zeros((), dtype)
    if max(high, 0.0) - min(low, 0.0) < 256 * tiny:
        low, high = 0.0, 0.0  # as good as nothing: a scale that float32 cannot hold would divide by 0
    unsigned = activation_uint8(low, high)
    if form.activations == "int8":
        return unsigned[0], np.array(int(unsigned[1]) - 128, np.int8)
    return unsigned


def _weight_integers(steps: Float, form: QdqForm) -> npt.NDArray[Any]:
    limit = form.weight_limit
    clipped = np.clip(steps, -limit, limit)
    if form.weights == _FP8:
        return clipped.astype(_DTYPES[_FP8])
    return np.rint(clipped).astype(_DTYPES[form.weights])


def _replace_readers(readers: list[tuple[ir.Node, int]], value: ir.Value) -> None:
    for node, index in readers:
        node.replace_input_with(index, value)
