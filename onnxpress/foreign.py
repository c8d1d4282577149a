"""Takes an .onnx file that somebody else exported, so that it goes through the same passes and the same gate.

The original, against which everything is compared, is the file itself on ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxpress.errors import ArtifactError, ConversionError, SourceError
from onnxpress.exporters import Exported
from onnxpress.graph import Graph
from onnxpress.manifest import Signature, TensorSpec
from onnxpress.runtime.session import Session

_EXAMPLE_SIZE = {0: 2}  # a symbolic axis is 8 long in the example, a leading one 2
_DEFAULT_SIZE = 8
_LARGEST = 1024


def open_onnx(path: Path, *, task: str | None, max_length: int | None) -> Exported:
    """Read a file. Only task "module" (named arrays in, named arrays out). Raises SourceError, ConversionError."""
    if task not in (None, "module"):
        raise ConversionError(
            f"{path} is an ONNX file and is built as task 'module' (named arrays in and out), not {task!r}: leave --task "
            "out, or build from the PyTorch model to get tokenization and answers."
        )
    if not path.is_file():
        raise SourceError(f"The file {path} does not exist.")
    try:
        model = ir.load(path)
        reference = Session(path)
    except ArtifactError as error:
        raise SourceError(f"{path} is not a readable ONNX model: {error}") from None
    except Exception as error:  # the protobuf parser's errors have no common base
        raise SourceError(f"{path} is not a readable ONNX model: {error}") from None
    signature = _signature(model)
    example = {spec.name: _example(spec) for spec in signature.inputs}
    try:
        reference.run(example)
    except Exception as error:
        raise ConversionError(
            f"{path} does not run on inputs of the shapes that it declares ({_shapes(signature)}): {error}"
        ) from None
    return Exported(
        graph=Graph(model=model, signature=signature),
        reference=reference,
        options={},
        example=example,
        tokenizer_files=(),
        name=path.stem,
        notes=("the original is the ONNX file itself",),
    )


def _signature(model: ir.Model) -> Signature:
    initializers = set(model.graph.initializers)
    inputs = tuple(_spec(value) for value in model.graph.inputs if value.name not in initializers)
    outputs = tuple(_spec(value) for value in model.graph.outputs)
    names = {axis for spec in inputs for axis in spec.shape if isinstance(axis, str)}
    return Signature(task="module", inputs=inputs, outputs=outputs, axes=dict.fromkeys(sorted(names), (1, _LARGEST)))


def _spec(value: ir.Value) -> TensorSpec:
    if value.dtype is None or value.shape is None:
        raise ConversionError(f"{value.name!r} of the graph has no declared dtype and shape; declare them in the file.")
    shape = tuple(
        int(axis) if isinstance(axis, int) else str(axis.value or f"{value.name}_{index}")
        for index, axis in enumerate(value.shape)
    )
    return TensorSpec(name=str(value.name), dtype=value.dtype.numpy().name, shape=shape)


def _example(spec: TensorSpec) -> np.ndarray:
    shape = [
        axis if isinstance(axis, int) else _EXAMPLE_SIZE.get(index, _DEFAULT_SIZE)
        for index, axis in enumerate(spec.shape)
    ]
    random = np.random.default_rng(0)
    if np.issubdtype(np.dtype(spec.dtype), np.floating):
        return random.standard_normal(shape).astype(spec.dtype)
    return random.integers(0, 2, shape).astype(spec.dtype)


def _shapes(signature: Signature) -> str:
    return ", ".join(f"{spec.name} {list(spec.shape)}" for spec in signature.inputs)
