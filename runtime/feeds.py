"""What is given to a session: arrays that fit its signature, or a sentence that says which does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxpress.errors import InputError
from onnxpress.manifest import Arrays, Signature, TensorSpec
from onnxpress.runtime.bfloat16 import BFLOAT16, host_dtype

_SAME = ("float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
_NUMPY = {f"tensor({name})": name for name in _SAME} | {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(bfloat16)": BFLOAT16,
    "tensor(string)": "str",
}


def is_name(axis: str | None) -> bool:
    """Whether an axis has a name: two that are called "?" or "-1", as some exporters write it, need not be equally long."""
    return axis is not None and any(map(str.isalpha, axis))


def check_feeds(feeds: Arrays, signature: Signature) -> dict[str, int]:
    """The sizes of the inputs' axes. Raises InputError where names, dtypes, shapes or integer values do not fit."""
    if not isinstance(feeds, Mapping):
        raise InputError(f"A {type(feeds).__name__} was given; `run` takes a dict of arrays by name.")
    specs = {spec.name: spec for spec in signature.inputs}
    if set(feeds) != set(specs):
        raise InputError(
            f"The inputs {sorted(feeds)} were given; the model takes {', '.join(map(str, specs.values()))}."
        )
    sizes: dict[str, tuple[int, str]] = {}
    for name, spec in specs.items():
        _check_array(spec, feeds[name], signature, sizes)
    return {axis: size for axis, (size, _) in sizes.items()}


def check_bindable(name: str, array: Any, names: Sequence[str]) -> None:
    """Raise InputError where an array cannot be bound to one of these names."""
    if name not in names:
        raise InputError(f"{name!r} was bound; there are: {', '.join(names)}.")
    if not isinstance(array, np.ndarray) or not array.dtype.isnative:
        kind = array.dtype.str if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise InputError(f"{kind} was bound to {name}; only a numpy array in this machine's byte order can be bound.")
    if not array.flags.c_contiguous:
        raise InputError(f"The array for {name} is not contiguous, so it cannot be bound: numpy.ascontiguousarray.")


def declared_signature(inner: Any) -> Signature:
    """What the file of an open model says of its inputs and outputs."""

    def specs(values: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=value.name,
                dtype=_NUMPY.get(value.type, value.type),
                shape=tuple(
                    axis if isinstance(axis, int) else axis if is_name(axis) else f"{value.name}_{index}"
                    for index, axis in enumerate(value.shape)
                ),
            )
            for value in values
        )

    return Signature(task="module", inputs=specs(inner.get_inputs()), outputs=specs(inner.get_outputs()))


def _check_array(spec: TensorSpec, array: Any, signature: Signature, sizes: dict[str, tuple[int, str]]) -> None:
    if not isinstance(array, np.ndarray):
        raise InputError(f"Input {spec.name} is a {type(array).__name__}; the model takes a numpy array: {spec}.")
    wanted = host_dtype(spec.dtype)
    if spec.dtype != "str" and array.dtype.name != wanted:
        raise InputError(
            f"Input {spec.name} has dtype {array.dtype.name}; the model takes {spec}: use .astype(numpy.{wanted})."
        )
    if not array.dtype.isnative:  # ONNX Runtime would read the bytes in the wrong order, without an error
        raise InputError(f"Input {spec.name} is {array.dtype.str}; the model takes this machine's byte order.")
    if array.ndim != len(spec.shape):
        raise InputError(f"Input {spec.name} has shape {list(array.shape)}; the model takes {spec}.")
    for axis, size in zip(spec.shape, array.shape, strict=True):
        if isinstance(axis, int):
            if size != axis:
                raise InputError(f"Input {spec.name} has shape {list(array.shape)}; the model takes {spec}.")
            continue
        low, high = signature.axes.get(axis, (0, 2**62))
        if not low <= size <= high:
            raise InputError(f"Input {spec.name} has {axis} {size}; the model takes {low} to {high}.")
        first, owner = sizes.setdefault(axis, (size, spec.name))
        if first != size:
            raise InputError(f"Input {spec.name} has {axis} {size} and {owner} has {first}; they have to agree.")
    if spec.right_padded and not (np.all(array[:, :1] == 1) and np.all(array[:, 1:] <= array[:, :-1])):
        raise InputError(
            f"Input {spec.name} has rows that are not ones and then zeros; this artifact takes texts of at least one token, padded on "
            "the right."
        )
    if spec.bounds is not None and array.size:
        low, high = int(array.min()), int(array.max())
        if low < spec.bounds[0] or high > spec.bounds[1]:
            raise InputError(
                f"Input {spec.name} has values from {low} to {high}; the model takes {spec.bounds[0]} to {spec.bounds[1]}."
            )
