"""Exports any torch.nn.Module with example inputs.

Axis 0 of the inputs is taken for the batch, and tried: a module that answers a second batch size gets a dynamic one.
Other axes are dynamic where the caller declares them.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch

from onnxpress.errors import ConversionError, SourceError
from onnxpress.exporters.asked_sizes import sizes_that_break
from onnxpress.exporters.bounds import index_bounds
from onnxpress.exporters.exported import Exported
from onnxpress.exporters.reference import TorchReference, evaluation_mode, version_of
from onnxpress.exporters.source import ModuleSource
from onnxpress.exporters.trace import Shape, Traced, tensor_spec, trace
from onnxpress.graph import Graph
from onnxpress.manifest import Signature
from onnxpress.masked import largest_unmasked


def export_module(source: ModuleSource) -> Exported:
    """Export a module. Raises SourceError and ConversionError."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in source.module.modules()):
        raise SourceError(
            f"{source.name} is a scripted module, whose code torch.export does not see: give the module itself."
        )
    # Copies: torch.export takes one tensor that is given twice for one input.
    example = {name: tensor.detach().clone() for name, tensor in _named(source).items()}
    _check_device(source)
    for name, tensor in example.items():
        if tensor.is_complex():
            raise SourceError(f"The example input {name} is complex; a graph takes real numbers: give two parts of it.")
        if tensor.numel() == 0:
            raise SourceError(f"The example input {name} is empty, {tuple(tensor.shape)}: give one with numbers in it.")
    for name, parameter in source.module.named_parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise SourceError(f"{name} of {source.name} has no shape yet: call the module once, and give it then.")
        if bool(torch.isnan(parameter).any()):
            raise SourceError(
                f"The weights of {type(source.module).__name__} are damaged: {name} holds numbers that are none (NaN)."
            )
    for part in source.module.modules():
        known = type(part).train.__module__ in (torch.nn.Module.__module__, "transformers.modeling_utils")
        if part.training and not known:
            raise SourceError(
                f"{type(part).__name__} has a train() of its own and is in training mode: give {source.name} after eval()."
            )
    module = PlainModule(source.module, tuple(example))
    try:
        with _unwritten_parameters(source.module):
            with torch.no_grad(), evaluation_mode(module) as written:
                answer = source.module(**{name: tensor.clone() for name, tensor in example.items()})
            with torch.no_grad(), evaluation_mode(module):
                again = source.module(**{name: tensor.clone() for name, tensor in example.items()})
    except ConversionError:
        raise
    except Exception as error:  # whatever a module raises
        raise SourceError(
            f"{type(source.module).__name__} fails on its example inputs: {type(error).__name__}: {error}"
        ) from error
    outputs = _output_names(answer, tuple(example))
    if not outputs:
        raise ConversionError(
            f"{type(source.module).__name__} answers nothing for the example inputs; a graph answers tensors."
        )
    if complex_ones := [
        name for name, (_, tensor) in zip(outputs, _tensors(answer), strict=True) if tensor.is_complex()
    ]:
        raise ConversionError(
            f"The answer {complex_ones[0]} is complex; a graph answers real numbers: torch.view_as_real makes two of each."
        )
    if not all(_alike(one, other) for (_, one), (_, other) in zip(_tensors(answer), _tensors(again), strict=True)):
        raise ConversionError(
            f"{type(source.module).__name__} answers the same inputs otherwise at each call, in evaluation mode too, so that nothing can be "
            "compared with it: take its random numbers, or what it keeps between calls, as an input."
        )
    if any(tensor.dtype == torch.bfloat16 for _, tensor in _tensors(answer)):
        raise ConversionError(
            "The module answers bfloat16, which numpy does not have: give a module that answers float32."
        )
    notes: list[str] = []
    if written:
        notes.append(
            f"written by the module: {', '.join(name.removeprefix('module.') for name in written)}; a graph keeps nothing between calls, and answers as at the first"
        )
    if source.dynamic_axes is not None:
        shapes = _declared_shapes(source, example)
        traced = _trace(module, example, shapes, outputs)
        _refuse_merged(source.name, traced.model, shapes)
    else:
        shapes, problem = _batch_shapes(module, example)
        try:
            traced = _trace(module, example, shapes, outputs)
        except ConversionError as error:
            if not _is_dynamic(shapes):
                raise
            problem = str(error)
            shapes = {name: tuple(tensor.shape) for name, tensor in example.items()}
            traced = _trace(module, example, shapes, outputs)
        if problem is not None:
            notes.append(f"batch: fixed as in the example inputs ({problem})")
    model, axes = traced.model, traced.axes
    for value, (_, tensor) in zip(model.graph.outputs, _tensors(answer), strict=True):
        _mend_rank(value, tensor)
    signature = Signature(
        task="module",
        inputs=tuple(tensor_spec(value, bounds=index_bounds(value)) for value in model.graph.inputs),
        outputs=tuple(tensor_spec(value) for value in model.graph.outputs),
        axes=axes,
    )
    if any(tensor.dtype == torch.bfloat16 for tensor in example.values()):
        raise ConversionError(
            "The example inputs are bfloat16, which numpy does not have: give module and inputs as float32."
        )
    return Exported(
        name=source.name,
        graph=Graph(model=model, signature=signature),
        reference=TorchReference(module, tuple(example), outputs),
        options={},
        example={name: tensor.detach().cpu().numpy() for name, tensor in example.items()},
        sizes=_asked(traced, example, shapes),
        notes=tuple(notes),
    )


class PlainModule(torch.nn.Module):
    """A module that takes tensors in the order of `names` and answers a tuple of tensors."""

    def __init__(self, module: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        # Not for this wrapper to switch: whether its parts train is theirs to say.
        self.training = module.training
        self.module = module
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All tensors of the module's answer, however nested."""
        answer = self.module(**dict(zip(self.names, inputs, strict=True)))
        found: list[torch.Tensor] = []
        for _, tensor in _tensors(answer):
            # A value of a graph has one name: what is answered as it came, or twice, is copied.
            known = any(tensor is other for other in (*inputs, *found))
            found.append(tensor.clone() if known else tensor)
        return tuple(found)


@contextmanager
def _unwritten_parameters(module: torch.nn.Module) -> Iterator[None]:
    """Raises ConversionError where forward changes a parameter, which is then as it was."""
    before = [(name, one, version_of(one), one.detach().clone()) for name, one in module.named_parameters()]
    try:
        yield
    finally:
        changed = [item for item in before if version_of(item[1]) != item[2] and not item[1].equal(item[3])]
        for _, parameter, _, content in changed:
            parameter.detach().copy_(content)
    if changed:
        raise ConversionError(
            f"{type(module).__name__} changes its parameter {changed[0][0]} in forward; a graph keeps nothing between calls: change it before."
        )


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """But for the order in which threads add, and for masks, which are like others of their size."""
    if one.shape != other.shape:
        return False
    one, other = one.detach().float(), other.detach().float()
    return torch.allclose(one, other, rtol=1e-2, atol=1e-2 * largest_unmasked(one.numpy()), equal_nan=True)


def _trace(
    module: PlainModule, example: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape], outputs: tuple[str, ...]
) -> Traced:
    # A trace takes an axis of size 1 for a constant, so a dynamic axis needs at least 2.
    wide = {name: _widened(tensor, shapes[name]) for name, tensor in example.items()}
    with evaluation_mode(module):
        name = type(module.module).__name__
        return trace(module, wide, shapes=shapes, axes=None, outputs=outputs, prefix="module.", name=name)


def _refuse_merged(name: str, model: Any, shapes: Mapping[str, Shape]) -> None:
    """Raise ConversionError where axes that were declared apart have one size in the trace, or a fixed one."""
    for value, shape in zip(model.graph.inputs, shapes.values(), strict=True):
        for axis, found in zip(shape, value.shape, strict=True):
            if isinstance(axis, str) and str(getattr(found, "value", found)) != axis:
                got = f"has always the size of {found}" if not isinstance(found, int) else f"is always {found}"
                raise ConversionError(
                    f"The axis {axis} of {value.name} is declared as dynamic, and in the trace of {name} it {got}: forward asks for that, or "
                    "the example inputs have it so by chance. Give an example of unlike sizes, one name for axes that are always alike, or leave "
                    "the axis out of dynamic_axes."
                )


def _asked(
    traced: Traced, example: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape]
) -> tuple[Mapping[str, int], ...]:
    """Sizes for which forward may go another way than for the example's."""
    own = {
        axis: size
        for name, shape in shapes.items()
        for axis, size in zip(shape, example[name].shape, strict=True)
        if isinstance(axis, str)
    }
    return tuple(sizes_that_break(traced.guards, list(shapes.values()), own, traced.axes)) if own else ()


def _widened(tensor: torch.Tensor, shape: Shape) -> torch.Tensor:
    for index, axis in enumerate(shape):
        if isinstance(axis, str) and tensor.shape[index] == 1:
            tensor = torch.cat([tensor, tensor], dim=index)
    return tensor


def _named(source: ModuleSource) -> dict[str, torch.Tensor]:
    """The example inputs by the names of forward's parameters."""
    parameters = inspect.signature(source.module.forward).parameters
    if isinstance(source.example, Mapping):
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        unknown = [name for name in source.example if name not in parameters]
        if unknown and not takes_any:
            raise SourceError(f"{source.name} has no input {unknown[0]}; its forward takes {', '.join(parameters)}.")
        return dict(source.example)
    names = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if len(source.example) > len(names):
        raise SourceError(
            f"{len(source.example)} example inputs were given for {source.name}, whose forward names {len(names)}: "
            f"{', '.join(names) or 'none'}. Inputs need names of their own, not *args; of a module that wraps another (torch.compile, "
            "DataParallel) give the inner one."
        )
    return dict(zip(names, source.example, strict=False))


def _check_device(source: ModuleSource) -> None:
    tensors = (*source.module.parameters(), *source.module.buffers())
    devices = sorted({str(tensor.device) for tensor in tensors} - {"cpu"})
    if devices:
        raise SourceError(
            f"{source.name} has weights on {devices[0]}; export runs on the CPU: call module.cpu() first."
        )


def _declared_shapes(source: ModuleSource, example: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    assert source.dynamic_axes is not None
    shapes: dict[str, Shape] = {}
    for name, tensor in example.items():
        declared = source.dynamic_axes.get(name, {})
        wrong = [axis for axis in declared if not 0 <= axis < tensor.dim()]
        if wrong:
            raise SourceError(f"Axis {wrong[0]} of {name} was declared dynamic; {name} has {tensor.dim()} axes.")
        shapes[name] = tuple(declared.get(axis, size) for axis, size in enumerate(tensor.shape))
    unknown = [name for name in source.dynamic_axes if name not in example]
    if unknown:
        raise SourceError(f"Dynamic axes were declared for {unknown[0]}; the inputs are {', '.join(example)}.")
    return shapes


def _batch_shapes(module: PlainModule, example: Mapping[str, torch.Tensor]) -> tuple[dict[str, Shape], str | None]:
    """Shapes with axis 0 as batch, where the module answers another batch size; else fixed ones and why."""
    fixed: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in example.items()}
    sizes = {tensor.shape[0] for tensor in example.values() if tensor.dim() > 0}
    if len(sizes) != 1 or any(tensor.dim() == 0 for tensor in example.values()):
        return fixed, "the example inputs do not all have the same first axis"
    size = sizes.pop()
    larger = [torch.cat([tensor, tensor, tensor[:1]]) for tensor in example.values()]  # (2 · batch + 1, …)
    try:
        with torch.no_grad(), evaluation_mode(module):
            answers = module(*larger)
    except Exception as error:  # whatever the module raises when a shape does not suit it
        return fixed, f"a batch of {2 * size + 1} fails with {type(error).__name__}"
    if not any(2 * size + 1 in answer.shape for answer in answers):
        return fixed, f"no output follows a batch of {2 * size + 1}"
    return {name: ("batch", *shape[1:]) for name, shape in fixed.items()}, None


def _is_dynamic(shapes: Mapping[str, Shape]) -> bool:
    return any(isinstance(axis, str) for shape in shapes.values() for axis in shape)


def _mend_rank(value: ir.Value, tensor: torch.Tensor) -> None:
    """Torch 2.11 traces the states of a bidirectional LSTM with an axis of 1 that real ones do not have."""
    assert value.shape is not None
    axes = list(value.shape)
    while len(axes) > tensor.dim() and 1 in axes:
        axes.remove(1)
    if len(axes) != len(value.shape):
        value.shape = ir.Shape(axes)


def _output_names(answer: object, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """Keys of dicts, or numbers; where that is the name of an input or of another output, with `_out` behind it."""
    names: list[str] = []
    for index, (key, _) in enumerate(_tensors(answer)):
        name = key or f"output_{index}"
        while name in (*inputs, *names):
            name += "_out"
        names.append(name)
    return tuple(names)


def _tensors(answer: object, name: str | None = None) -> Iterator[tuple[str | None, torch.Tensor]]:
    """The tensors in an answer, in order; those in dicts by their keys, and in dataclasses by their fields."""
    if dataclasses.is_dataclass(answer) and not isinstance(answer, Mapping | type):
        answer = {part.name: getattr(answer, part.name) for part in dataclasses.fields(answer)}
    if isinstance(answer, torch.Tensor):
        yield name, answer
    elif isinstance(answer, Mapping):
        for key, part in answer.items():
            yield from _tensors(part, str(key) if name is None else f"{name}.{key}")
    elif isinstance(answer, tuple | list):
        for index, part in enumerate(answer):
            yield from _tensors(part, None if name is None else f"{name}.{index}")
    elif answer is not None:
        raise ConversionError(f"The module answers a {type(answer).__name__}; a graph can answer tensors only.")
