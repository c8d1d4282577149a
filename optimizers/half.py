"""Half precision (fp16 or bf16) for GPU targets, with operators that stay in float32.

    x (float32) → MatMul → y   →   Cast(x, half) → MatMul(half weights) → Cast(y, float32)

Graph inputs and outputs keep their dtype, but for a language model's cache, which goes from step to step as it is. Operators in
KEEP are given float32; each has its reason. What only goes on with their numbers (FOLLOWS) stays in float32 with them, so that nothing
is cast back and forth between the sum, the quotient and the norm of a pooled embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxpress.errors import ConversionError
from onnxpress.graph import Graph
from onnxpress.manifest import Signature, TensorSpec
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.edits import add_constant, drop_unused_constants, insert_behind, unused_name
from onnxpress.optimizers.matching import name_of
from onnxpress.optimizers.shapes import infer_shapes

KEEP: Mapping[str, str] = {
    "ReduceL2": "a sum of squares passes 65504 in fp16 from a root mean square of 13 on at 384 channels",
    "ReduceSum": "sums over a long axis lose more bits than half precision has",
    "ReduceMean": "as ReduceSum",
    "ReduceSumSquare": "as ReduceL2",
    "LpNormalization": "as ReduceL2",
    "CumSum": "positions past 2048 are not exact in fp16",
    "Range": "as CumSum",
    "Pow": "squares overflow fp16 early",
    "Exp": "overflows fp16 past 11",
    "Log": "loses its tail near zero",
    "Resize": "coordinates past 2048 are not exact in fp16",
    "NonMaxSuppression": "has no other form",
    "DynamicQuantizeLinear": "has no other form (an integer graph of another tool)",
    "DynamicQuantizeLSTM": "as DynamicQuantizeLinear",
}
# Operators whose CUDA kernels know float16 and not bfloat16, by the classes in onnxruntime-gpu 1.31.1's library.
_NO_BFLOAT16 = frozenset({
    "ArgMax", "ArgMin", "BatchNormalization", "Ceil", "Clip", "ConvTranspose", "DequantizeLinear", "Elu", "Equal", "Floor", "GRU", "Greater",
    "GreaterOrEqual", "InstanceNormalization", "LRN", "LSTM", "LeakyRelu", "Less", "LessOrEqual", "NonZero", "OneHot", "PRelu", "Pad",
    "QuantizeLinear", "RNN", "Reciprocal", "ReduceL1", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMin", "ReduceProd", "Round",
    "Selu", "Shrink", "ThresholdedRelu",
})  # fmt: skip
_CLASSIC = "ai.onnx.ml"  # the domain of trees, scalers and the like, which know float32 alone
_SCALES_IN_HALF = 19  # the opset since which QuantizeLinear and DequantizeLinear know it
FOLLOWS = frozenset(
    ("Add", "Clip", "Div", "Expand", "Max", "Min", "Mul", "Reshape", "Sqrt", "Squeeze", "Sub", "Unsqueeze")
)


@dataclass(frozen=True, kw_only=True)
class _Half:
    lossless: ClassVar[bool] = False
    dtype: ClassVar[ir.DataType]
    in_float: ClassVar[frozenset[str]] = frozenset(KEEP)  # operators

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """Turn every float32 weight and operator but `in_float`'s and `context.keep`'s into half precision."""
        body = graph.model.graph
        if any(node.graph is not body for node in body.all_nodes()):
            raise ConversionError(
                "Half precision is not implemented for graphs with subgraphs (If, Loop, Scan); build with --precision fp32."
            )
        if any(value.dtype is None for node in body for value in node.outputs if value.name):
            # Files of other exporters leave types out.
            infer_shapes(graph.model)
        casts: dict[tuple[int, ir.DataType], ir.Value] = {}
        nodes = list(body)
        for node in nodes:
            known = node.outputs if node.domain == _CLASSIC else node.inputs if node.op_type in self.in_float else ()
            if any(value is not None and value.dtype is None for value in known):
                raise ConversionError(
                    f"{node.name or node.op_type} has to stay in float32, and a type of what it reads or gives is not known: build with "
                    "--precision fp32, or export the model with types."
                )
        keep = context.keep
        if context.target.uniform_steps:  # whose attention has no kernel for float32
            keep -= {str(node.name) for node in nodes if node.op_type == "GroupQueryAttention"}
        cache = self._halve_cache(nodes, keep)
        was_float = {id(value) for node in nodes for value in node.outputs if value.dtype == ir.DataType.FLOAT}
        kept: set[int] = set()  # values that stay in float32
        touched = [self._convert(graph, node, keep, casts, was_float, kept) for node in nodes]
        for index, output in enumerate(list(body.outputs)):
            if id(output) in was_float and output.dtype == self.dtype and output.name not in cache:
                name = output.name
                output.name = unused_name(body, f"{name}_half")
                cast = ir.node("Cast", [output], {"to": ir.DataType.FLOAT.value}, name=f"{name}_cast")
                cast.outputs[0].name = name
                cast.outputs[0].shape, cast.outputs[0].type = output.shape, ir.TensorType(ir.DataType.FLOAT)
                body.append(cast)
                body.outputs[index] = cast.outputs[0]
        drop_unused_constants(graph)
        names = tuple(name for name in touched if name is not None)
        reasons = sorted(
            {node.op_type for node in nodes if node.op_type in self.in_float and any(map(_is_float, node.inputs))}
        )
        notes = (f"{len(names)} operators" + (f"; in float32: {', '.join(reasons)}" if reasons else ""),)
        if cache:
            graph = Graph(model=graph.model, signature=with_dtype(graph.signature, cache, self.dtype.numpy().name))
        return PassResult(graph=graph, changes=len(names), notes=notes, touched=names)

    def _halve_cache(self, nodes: list[ir.Node], keep: frozenset[str]) -> set[str]:
        """Give the float32 cache of attentions half precision; the names of the past and the present."""
        names: set[str] = set()
        for node in nodes:
            if node.op_type != "GroupQueryAttention" or node.name in keep:
                continue
            for value in (*node.inputs[3:5], *node.outputs[1:3]):
                if value is not None and value.dtype == ir.DataType.FLOAT:
                    value.type = ir.TensorType(self.dtype)
                    names.add(str(value.name))
        return names

    def _convert(
        self,
        graph: Graph,
        node: ir.Node,
        keep: frozenset[str],
        casts: dict[tuple[int, ir.DataType], ir.Value],
        was_float: set[int],
        kept: set[int],
    ) -> str | None:
        stays = (
            node.op_type in self.in_float
            or node.domain == _CLASSIC
            or node.name in keep
            or _follows(node, kept)
            or _scales_in_float(graph, node)
        )
        wanted = ir.DataType.FLOAT if stays else self.dtype
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (ir.DataType.FLOAT, self.dtype) and value.dtype != wanted:
                node.replace_input_with(index, self._cast(graph, value, wanted, casts))
        if stays:
            kept.update(id(output) for output in node.outputs)
            return None
        touched = False
        for name in ("to", "dtype"):
            attribute = node.attributes.get(name)
            if attribute is not None and attribute.value == ir.DataType.FLOAT.value:
                node.attributes[name] = ir.AttrInt64(name, self.dtype.value)
        if node.op_type == "Constant":
            _as_tensor(node)
        constant = node.attributes.get("value")
        if node.op_type == "ConstantOfShape" and constant is None:  # float32 zeros
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(self._array(np.zeros(1, np.float32))))
        elif node.op_type in ("Constant", "ConstantOfShape") and constant is not None:
            tensor = constant.as_tensor()
            if tensor.dtype == ir.DataType.FLOAT:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(self._array(tensor.numpy())))
        for output in node.outputs:
            if id(output) in was_float:
                output.type = ir.TensorType(self.dtype)
                touched = True
        return name_of(node) if touched else None

    def _cast(
        self,
        graph: Graph,
        value: ir.Value,
        wanted: ir.DataType,
        casts: dict[tuple[int, ir.DataType], ir.Value],
    ) -> ir.Value:
        key = (id(value), wanted)
        if key not in casts:
            if value.const_value is not None and value.is_initializer() and wanted == self.dtype:
                casts[key] = add_constant(graph, f"{value.name}_half", self._array(value.const_value.numpy()))
            else:
                suffix = "float" if wanted == ir.DataType.FLOAT else "half"
                cast = ir.node("Cast", [value], {"to": wanted.value}, name=f"{value.name}_to_{suffix}")
                cast.outputs[0].name = unused_name(graph.model.graph, f"{value.name}_{suffix}")
                cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(wanted)
                insert_behind(graph, value, [cast])
                casts[key] = cast.outputs[0]
        return casts[key]

    def _array(self, array: np.ndarray) -> np.ndarray:
        """Half precision; numbers past the range end at its ends (a mask's large negative one stays finite); infinity stays."""
        limits = ml_dtypes.finfo(self.dtype.numpy())  # type: ignore[no-untyped-call]
        clipped: np.ndarray = np.where(np.isinf(array), array, np.clip(array, float(limits.min), float(limits.max)))
        return clipped.astype(self.dtype.numpy())


def _scales_in_float(graph: Graph, node: ir.Node) -> bool:
    """Whether a node's scales have no half precision: before opset 19."""
    linear = node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.domain == ""
    return linear and graph.model.opset_imports.get("", _SCALES_IN_HALF) < _SCALES_IN_HALF


def _as_tensor(node: ir.Node) -> None:
    """Let a Constant of plain floats hold a tensor, whose type can be another."""
    for name in ("value_float", "value_floats"):
        attribute = node.attributes.pop(name, None)
        if attribute is not None:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array(attribute.value, np.float32)))


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _follows(node: ir.Node, kept: set[int]) -> bool:
    """Whether a node only goes on with numbers that stay in float32, and with constants."""
    if node.op_type not in FOLLOWS or node.domain != "":
        return False
    numbers = [value for value in node.inputs if value is not None and value.dtype == ir.DataType.FLOAT]
    variable = [value for value in numbers if value.const_value is None]
    return (
        bool(variable)
        and all(id(value) in kept for value in variable)
        and not any(
            value is not None and value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) for value in node.inputs
        )
    )


def with_dtype(signature: Signature, names: set[str], dtype: str) -> Signature:
    """A signature in which some inputs and outputs have another dtype."""

    def changed(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(dataclasses.replace(spec, dtype=dtype) if spec.name in names else spec for spec in specs)

    return dataclasses.replace(signature, inputs=changed(signature.inputs), outputs=changed(signature.outputs))


@dataclass(frozen=True, kw_only=True)
class Float16(_Half):
    """IEEE half precision: 11 significant bits, largest value 65504."""

    name: ClassVar[str] = "fp16"
    dtype: ClassVar[ir.DataType] = ir.DataType.FLOAT16


@dataclass(frozen=True, kw_only=True)
class BFloat16(_Half):
    """bfloat16: 8 significant bits, float32's range. In ONNX Runtime's CUDA provider fewer operators know it than know float16."""

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[ir.DataType] = ir.DataType.BFLOAT16
    in_float: ClassVar[frozenset[str]] = frozenset(KEEP) | _NO_BFLOAT16

    def apply(self, graph: Graph, context: PassContext) -> PassResult:
        """As above. Raises ConversionError for MaxPool on CUDA, too: it has a kernel up to opset 21, and bfloat16 convolutions begin at 22."""
        if context.target.name == "cuda" and "MaxPool" in graph.operators():
            raise ConversionError(
                "ONNX Runtime has no CUDA kernel for MaxPool in graphs of bfloat16: build with --precision fp16."
            )
        return super().apply(graph, context)
