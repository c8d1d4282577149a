"""Traces a PyTorch module with torch.export and translates it to an onnx_ir model of opset 23."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from torch.export import Dim, ExportedProgram

from onnxpress.errors import ConversionError
from onnxpress.exporters.cleanup import clean
from onnxpress.exporters.quiet import quiet
from onnxpress.exporters.recurrent_layers import whole_recurrent_layers
from onnxpress.exporters.traced_program import spare_decomposition
from onnxpress.manifest import TensorSpec

OPSET = 23
LARGEST_BATCH = 1024
LARGEST_AXIS = 2**20  # of any other axis that nothing in the model limits

Shape = Sequence[int | str]  # symbolic axes by name
Axes = Mapping[str, tuple[int, int]]  # symbolic axis: inclusive (minimum, maximum)


class Traced(NamedTuple):
    """A graph, the ranges of its symbolic axes, and what forward asked of sizes: expressions over L["inputs"][i].size()."""

    model: ir.Model
    axes: Axes
    guards: tuple[str, ...]


def trace(
    module: torch.nn.Module,
    example: Mapping[str, torch.Tensor],
    *,
    shapes: Mapping[str, Shape],
    axes: Axes | None,
    outputs: Sequence[str],
    prefix: str,
    name: str,
) -> Traced:
    """The graph of `module`, which takes the example's tensors in their order and answers a tuple of tensors.

    shapes: of each input. axes: the ranges of the symbolic axes; where None they are found in the trace. prefix: what
    to take off the weights' names. name: the model's, for errors. The weights are not copied: they share the module's
    memory. Raises ConversionError.
    """
    try:
        dynamic = tuple(
            {index: _dimension(axis, axes) for index, axis in enumerate(shapes[name]) if isinstance(axis, str)}
            for name in example
        )
        with quiet(), torch.no_grad(), whole_recurrent_layers():
            program = _exported(module, example, dynamic, given=axes is not None)
            ranges = _ranges(program, shapes) if axes is None else axes
            guards = tuple(getattr(program, "_guards_code", None) or ())
            try:
                spare_decomposition(program)
                model = _translated(program, example, outputs)
            except Exception:
                # Something in it has to be taken apart first; what does not convert then either is raised.
                program = _exported(module, example, dynamic, given=axes is not None)
                model = _translated(program, example, outputs)
            clean(model, inputs=shapes, prefix=prefix)
    except (ConversionError, MemoryError):
        raise
    except Exception as error:  # torch.export raises errors of every kind, and so do models while they are traced
        raise ConversionError(f"{name} does not convert to ONNX: {_first_lines(error)}") from error
    return Traced(model, ranges, guards)


def _exported(
    module: torch.nn.Module, example: Mapping[str, torch.Tensor], dynamic: tuple[Any, ...], *, given: bool
) -> ExportedProgram:
    """given: the ranges of axes are not up to the tracer, which in torch 2.11 doubts even that 8 n <= 16 n."""
    with redirect_stderr(io.StringIO()):  # a graph that cannot be traced is printed there, and raised
        # The modules take *inputs, which torch.export sees as one argument that is a tuple.
        return torch.export.export(
            module,
            tuple(example.values()),
            dynamic_shapes=(dynamic,),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=given,
        )


def _translated(program: ExportedProgram, example: Mapping[str, torch.Tensor], outputs: Sequence[str]) -> ir.Model:
    translated = torch.onnx.export(
        program,
        dynamo=True,
        input_names=list(example),
        output_names=list(outputs),
        opset_version=OPSET,
        optimize=False,
        verbose=False,
        custom_translation_table={
            torch.ops.aten.erfinv.default: _erfinv,
            torch.ops.aten._is_all_true.default: _is_all_true,
        },
    )
    assert translated is not None
    return translated.model


def _is_all_true(x: Any) -> Any:
    """What is left of checks of values, which torch does not translate."""
    from onnxscript import opset18 as op

    return op.Cast(op.ReduceMin(op.Cast(x, to=ir.DataType.INT32), keepdims=0), to=ir.DataType.BOOL)


def _erfinv(x: Any) -> Any:
    """The inverse of the error function, which torch does not translate, in float32's precision.

    Two polynomials in w = -log(1 - x²), and in its root beyond |x| = 0.9966 (M. Giles, Approximating the erfinv function, GPU Computing Gems 2, 2010).
    """
    from onnxscript import opset18 as op

    def number(value: float) -> Any:
        return op.Constant(value_float=value)

    def polynomial(y: Any, coefficients: Sequence[float]) -> Any:
        total = number(coefficients[0])
        for coefficient in coefficients[1:]:
            total = op.Add(op.Mul(total, y), number(coefficient))
        return total

    w = op.Neg(op.Log(op.Mul(op.Sub(number(1), x), op.Add(number(1), x))))
    near = polynomial(op.Sub(w, number(2.5)), _ERFINV_NEAR)
    far = polynomial(op.Sub(op.Sqrt(w), number(3)), _ERFINV_FAR)
    return op.Mul(op.Where(op.Less(w, number(5)), near, far), x)


_ERFINV_NEAR: tuple[float, ...] = (2.81022636e-8, 3.43273939e-7, -3.5233877e-6, -4.39150654e-6, 2.1858087e-4)
_ERFINV_NEAR += (-1.25372503e-3, -4.17768164e-3, 0.246640727, 1.50140941)
_ERFINV_FAR: tuple[float, ...] = (-2.00214257e-4, 1.00950558e-4, 1.34934322e-3, -3.67342844e-3, 5.73950773e-3)
_ERFINV_FAR += (-7.6224613e-3, 9.43887047e-3, 1.00167406, 2.83297682)


def tensor_spec(value: ir.Value, *, bounds: tuple[int, int] | None = None) -> TensorSpec:
    """What the signature says about an input or output of a graph."""
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape)
    return TensorSpec(name=str(value.name), dtype=value.dtype.numpy().name, shape=shape, bounds=bounds)


def _dimension(axis: str, axes: Axes | None) -> Any:
    if axes is None:
        return Dim.DYNAMIC
    low, high = axes[axis]
    return Dim(axis, min=low, max=high)


def _ranges(program: ExportedProgram, shapes: Mapping[str, Shape]) -> Axes:
    """The range of every symbolic axis that the trace's guards leave."""
    placeholders = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    ranges: dict[str, tuple[int, int]] = {}
    for node, shape in zip(placeholders, shapes.values(), strict=True):
        for size, axis in zip(node.meta["val"].shape, shape, strict=True):
            if not isinstance(axis, str):
                continue
            largest = LARGEST_BATCH if axis == "batch" else LARGEST_AXIS
            low, high = ranges.get(axis, (1, largest))
            allowed = program.range_constraints[size.node.expr]
            # torch assumes that a dynamic axis is not 0 or 1, unless something depends on it; a case checks it.
            smallest = int(allowed.lower) if allowed.lower > 2 else 1
            ranges[axis] = (max(low, smallest), min(high, int(min(allowed.upper, largest))))
    return ranges


def _first_lines(error: Exception) -> str:
    """The deepest cause, in a few words: the exporter wraps errors and appends pages."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {' '.join(lines[:3])[:400]}"
