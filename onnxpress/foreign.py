"""Takes an .onnx file that somebody else exported, so that it goes through the same passes and the same gate.

The original, against which everything is compared, is the file itself on ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from onnxpress.errors import ArtifactError, ConversionError, InputError, OnnxpressError, RecipeError, SourceError
from onnxpress.exporters import Exported
from onnxpress.exporters.bounds import index_bounds
from onnxpress.exporters.trace import LARGEST_AXIS, LARGEST_BATCH
from onnxpress.graph import Graph
from onnxpress.manifest import Arrays, Signature, TensorSpec
from onnxpress.masked import largest_unmasked
from onnxpress.optimizers.deduplicate import RANDOM
from onnxpress.optimizers.shapes import infer_shapes
from onnxpress.runtime.bfloat16 import host_dtype
from onnxpress.runtime.feeds import is_name
from onnxpress.runtime.session import Session
from onnxpress.sample_arrays import read_arrays
from onnxpress.workbench import fatal_optimizers

_WEIGHTS_ALONE = 4  # the IR version from which weights need not be inputs
_EXAMPLE_BATCH = 2  # how long leading symbolic axes are in the example
_EXAMPLE_SIZES = (8, 64, 512)  # how long others are: the first with which the file runs


def open_onnx(path: Path, *, task: str | None = None, samples: Path | None = None) -> Exported:
    """Read a file. Only task "module" (named arrays in, named arrays out).

    samples: a file of arrays, whose first are the example inputs; random ones without it. Raises SourceError, ConversionError, RecipeError.
    """
    if task not in (None, "module"):
        raise ConversionError(
            f"{path} is an ONNX file and is built as task 'module' (named arrays in and out), not {task!r}: leave --task "
            "out, or build from the PyTorch model to get tokenization and answers."
        )
    if not path.is_file():
        raise SourceError(f"The file {path} does not exist.")
    try:
        proto = onnx.load(path, load_external_data=False)
        if names := _sparse(proto.graph):
            raise ConversionError(
                f"{path} has weights that are stored as sparse tensors ({', '.join(names)}): write them as dense ones."
            )
        try:
            model = ir.from_proto(proto)
        except Exception:  # of inputs and outputs that are no tensors, which a session can name
            _check_numeric(Session(path).signature, path)
            raise
        # Before weights are read: it refuses those outside of the file's folder, which onnx_ir reads where a path is a bare name.
        reference = Session(path, disabled_optimizers=fatal_optimizers(model))
        _check_numeric(reference.signature, path)
        model.graph.sort()  # ONNX Runtime takes nodes in any order
        ir.external_data.set_base_dir(model.graph, path.parent)
        ir.external_data.load_to_model(model)  # weights beside the file: the graphs of a build are elsewhere
        _load_constants(model)
    except ArtifactError as error:
        raise SourceError(str(error)) from None
    except OnnxpressError:
        raise
    except Exception as error:  # the protobuf parser's errors have no common base
        raise SourceError(f"{path} is not a readable ONNX model: {error}") from None
    for value in [value for value in model.graph.inputs if value.name in model.graph.initializers]:
        model.graph.inputs.remove(value)  # old exporters list weights as inputs with a default
    outputs = list(dict.fromkeys(model.graph.outputs))  # some are listed twice
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)
    if not model.graph.inputs:
        raise ConversionError(f"{path} takes no inputs, so that it always answers the same.")
    model.ir_version = max(model.ir_version, _WEIGHTS_ALONE)
    for value in (*model.graph.inputs, *model.graph.outputs, *(out for node in model.graph for out in node.outputs)):
        if value.shape is not None and not all(map(_is_declared, value.shape)):
            value.shape = ir.Shape([axis if _is_declared(axis) else None for axis in value.shape])
    inputs = tuple(_spec(value) for value in model.graph.inputs)
    found = _random_example(reference, inputs, path) if samples is None else _first_samples(reference, inputs, samples)
    example = found.arrays
    if found.alone:
        for value in model.graph.inputs:
            assert value.shape is not None
            value.shape = ir.Shape([1, *list(value.shape)[1:]])
    answers = reference.run(example)
    _check_numbers(model, answers, path, samples)
    _check_repeats(model, answers, reference.run(example), path)
    for value in model.graph.outputs:  # which may be declared by their names alone, or wrongly
        answer = answers[str(value.name)]
        value.dtype = value.dtype or ir.DataType.from_numpy(answer.dtype)
        if value.shape is None or len(value.shape) != answer.ndim:
            value.shape = ir.Shape([None] * answer.ndim)
        sizes = zip(value.shape, answer.shape, strict=True)
        value.shape = ir.Shape([None if isinstance(axis, int) and axis != size else axis for axis, size in sizes])
    _name_rows(model, _signature(model), reference, example)
    signature = _signature(model)
    infer_shapes(model)
    return Exported(
        graph=Graph(model=model, signature=signature),
        reference=reference,
        options={},
        example=example,
        name=path.stem,
        notes=(
            "the original is the ONNX file itself",
            *(("batch: 1; the file declares any, and runs with no other",) if found.alone else ()),
        ),
    )


def _is_declared(axis: object) -> bool:
    """Whether an axis has a size or a name; paddle2onnx writes -1 and "?" where others write nothing."""
    return axis >= 0 if isinstance(axis, int) else is_name(getattr(axis, "value", None))


def _signature(model: ir.Model) -> Signature:
    inputs = tuple(_spec(value) for value in model.graph.inputs)
    outputs = tuple(_spec(value) for value in model.graph.outputs)
    return Signature(task="module", inputs=inputs, outputs=outputs, axes=_axes(inputs))


def _axes(inputs: tuple[TensorSpec, ...]) -> dict[str, tuple[int, int]]:
    """The least and largest size of each symbolic axis."""
    leading = _leading_axes(inputs)
    names = sorted({axis for spec in inputs for axis in spec.shape if isinstance(axis, str)})
    return {name: (1, LARGEST_BATCH if name in leading else LARGEST_AXIS) for name in names}


def _load_constants(model: ir.Model) -> None:
    """Read what nodes have in a file beside the model's, as `load_to_model` does for initializers."""
    for node in model.graph.all_nodes():
        for name, attribute in node.attributes.items():
            if attribute.type != ir.AttributeType.TENSOR or attribute.is_ref():
                continue
            if isinstance(tensor := attribute.as_tensor(), ir.ExternalTensor):
                loaded = ir.external_data.convert_tensors_from_external([tensor])[0]
                node.attributes[name] = ir.AttrTensor(name, loaded)


def _check_numeric(signature: Signature, path: Path) -> None:
    """Raises ConversionError where an input or output holds something else than numbers: text, sequences, maps."""
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for spec in specs:
            if spec.dtype == "str" or "(" in spec.dtype:
                raise ConversionError(
                    f"{path}: the {kind} {spec.name} is {'text' if spec.dtype == 'str' else spec.dtype}; a build takes and compares arrays of "
                    "numbers. onnx.utils.extract_model writes a file with other inputs and outputs (skl2onnx: options={'zipmap': False})."
                )


def _sparse(graph: onnx.GraphProto) -> list[str]:
    """Names of the sparse tensors in a graph and those inside it."""
    found = [tensor.values.name for tensor in graph.sparse_initializer]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                found.append(node.output[0])
            for inner in (attribute.g, *attribute.graphs):
                found += _sparse(inner)
    return found


def _check_repeats(model: ir.Model, answers: Arrays, again: Arrays, path: Path) -> None:
    """Raises ConversionError where the same inputs are answered in two ways, so that nothing can be compared."""
    if all(
        np.allclose(answer, again[name], rtol=1e-2, atol=1e-2 * largest_unmasked(answer))
        for name, answer in answers.items()
    ):
        return
    random = ", ".join(sorted({node.op_type for node in model.graph.all_nodes()} & RANDOM))
    raise ConversionError(
        f"{path} answers the same inputs otherwise at each call{f' ({random})' if random else ''}, so that nothing can be compared "
        "with it: export it in evaluation mode, or give its random numbers as an input."
    )


def _check_numbers(model: ir.Model, answers: Arrays, path: Path, samples: Path | None) -> None:
    """Raises SourceError where answers are no numbers, which no graph could be compared with."""
    if not any(np.issubdtype(answer.dtype, np.floating) and np.isnan(answer).any() for answer in answers.values()):
        return
    for value in model.graph.initializers.values():
        if (
            value.dtype == ir.DataType.FLOAT
            and value.const_value is not None
            and np.isnan(value.const_value.numpy()).any()
        ):
            raise SourceError(f"The weights in {path} are damaged: {value.name} holds numbers that are none (NaN).")
    where = (
        "where its inputs are normal random numbers, so that nothing can be compared with it: give real ones with --eval"
        if samples is None
        else f"for the first samples of {samples}, so that nothing can be compared with it"
    )
    raise SourceError(f"{path} answers with numbers that are none (NaN) {where}.")


def _name_rows(model: ir.Model, signature: Signature, reference: Session, example: Arrays) -> None:
    """Call the first axis of outputs what that of all inputs is called, where both count the same rows.

    tf2onnx and torch's older exporter give it a name of its own, or none.
    """
    rows = {spec.shape[0] if spec.shape else None for spec in signature.inputs}
    name = next(iter(rows), None)
    pairs = zip(model.graph.outputs, signature.outputs, strict=True)
    others = {
        value: spec for value, spec in pairs if spec.shape and isinstance(spec.shape[0], str) and spec.shape[0] != name
    }
    if len(rows) != 1 or not isinstance(name, str) or not others:
        return
    more = {key: np.concatenate([array, array[:1]]) for key, array in example.items()}
    try:
        answers, more_answers = reference.run(example), reference.run(more)
    except InputError:  # one of them alone runs
        return
    count = len(next(iter(example.values())))
    for value, spec in others.items():
        if (len(answers[spec.name]), len(more_answers[spec.name])) == (count, count + 1):
            value.shape = ir.Shape([name, *spec.shape[1:]])


def _leading_axes(inputs: tuple[TensorSpec, ...]) -> set[int | str]:
    """Axes that are the first of every input that has them."""
    places = [(axis, place) for spec in inputs for place, axis in enumerate(spec.shape)]
    return {axis for axis, place in places if place == 0} - {axis for axis, place in places if place > 0}


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None:
        raise ConversionError(f"{value.name!r} of the graph has no declared dtype and shape; declare them in the file.")
    if 0 in value.shape:
        raise ConversionError(f"{value.name!r} of the graph has an axis of size 0, so that it never holds a number.")
    shape = tuple(
        int(axis) if isinstance(axis, int) else str(axis.value or f"{value.name}_{index}")
        for index, axis in enumerate(value.shape)
    )
    return TensorSpec(name=str(value.name), dtype=value.dtype.numpy().name, shape=shape, bounds=index_bounds(value))


class _Found(NamedTuple):
    """Inputs that the file runs with. alone: where it runs with one row and not with two, though its first axis is a name."""

    arrays: Arrays
    alone: bool


def _first_samples(reference: Session, inputs: tuple[TensorSpec, ...], path: Path) -> _Found:
    """Two samples of a file where the file's model takes any number, else as many as it takes. Raises RecipeError."""
    given = read_arrays(path, Signature(task="module", inputs=inputs, outputs=(), axes=_axes(inputs)))
    any_number = not given.whole and all(isinstance(spec.shape[0], str) for spec in inputs)
    rows = min(_EXAMPLE_BATCH, given.calls()) if any_number else 1
    refused: InputError | None = None
    for count in dict.fromkeys((rows, 1)):
        example = given.call(0, count)
        try:
            reference.run(example)
        except InputError as error:
            refused = refused or error
        else:
            return _Found(example, count < rows)
    raise RecipeError(f"The model does not run on the first samples of {path}: {refused}") from None


def _random_example(reference: Session, inputs: tuple[TensorSpec, ...], path: Path) -> _Found:
    leading = _leading_axes(inputs)
    together = all(spec.shape and spec.shape[0] in leading and isinstance(spec.shape[0], str) for spec in inputs)
    refused: Exception | None = None
    for rows in (_EXAMPLE_BATCH, 1) if together else (_EXAMPLE_BATCH,):
        for size in _EXAMPLE_SIZES:
            try:
                example = {spec.name: _example(spec, leading, rows, size) for spec in inputs}
                reference.run(example)
            except (InputError, MemoryError) as error:
                refused = refused or error
            else:
                return _Found(example, rows < _EXAMPLE_BATCH)
    shapes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in inputs)
    raise ConversionError(f"{path} does not run on inputs of the shapes that it declares ({shapes}): {refused}")


def _example(spec: TensorSpec, leading: set[int | str], rows: int, size: int) -> np.ndarray:
    """Normal floats, ones in masks; row numbers of the table that is looked up; where there is none any integers of 8 bits, and ones of more."""
    shape = [axis if isinstance(axis, int) else rows if axis in leading else size for axis in spec.shape]
    random = np.random.default_rng(0)
    dtype = np.dtype(host_dtype(spec.dtype))
    if np.issubdtype(dtype, np.floating) and "mask" not in spec.name.lower():
        return random.standard_normal(shape).astype(dtype)
    if spec.bounds is None and dtype.itemsize == 1 and dtype != np.bool_:
        whole = np.iinfo(dtype)  # pixels
        return random.integers(whole.min, whole.max + 1, shape).astype(dtype)
    if spec.bounds is None:
        return np.ones(shape, dtype)
    return random.integers(spec.bounds[0], spec.bounds[1] + 1, shape).astype(dtype)
