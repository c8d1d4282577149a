"""Reads a user's arrays for a module: .npz or .safetensors with one array an input, the first axis counting samples, and labels.

A sample is a row of each input. Where inputs do not all begin with the batch (a state, a single number), it is a whole call: arrays
have one axis more than the inputs.
An array named `labels` (integers, (samples,)) says which class is right, where the first output is scores over classes. Nothing is ever
unpickled.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.errors import ArtifactError, RecipeError
from onnxpress.manifest import Arrays, Signature, TensorSpec
from onnxpress.runtime.bfloat16 import host_dtype
from onnxpress.runtime.tensor_file import read_tensors

_LABELS = "labels"


@dataclass(frozen=True, kw_only=True)
class SampleArrays:
    """inputs: by name, (samples, …). labels: int64 (samples,) or None. rows: samples in one call at least, where that is fixed.

    whole: each sample is a call's whole inputs, and none can share one.
    """

    path: Path
    inputs: Arrays
    labels: npt.NDArray[np.int64] | None
    rows: int
    whole: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def calls(self) -> int:
        """Into how many calls the samples can be cut."""
        return len(self) // self.rows

    def call(self, index: int, calls: int = 1) -> dict[str, npt.NDArray[Any]]:
        """Inputs of one call, or of several that follow each other, in one, where these can share one."""
        if self.whole:
            return {name: np.asarray(array[index]) for name, array in self.inputs.items()}
        start = index * self.rows
        return {name: array[start : start + calls * self.rows] for name, array in self.inputs.items()}


def read_arrays(path: Path, signature: Signature) -> SampleArrays:
    """Read a file and hold it against what the graph takes. Raises RecipeError."""
    arrays = _read(path)
    names = [spec.name for spec in signature.inputs]
    labels = None if _LABELS in names else arrays.pop(_LABELS, None)
    if sorted(arrays) != sorted(names):
        raise RecipeError(
            f"{path} has {', '.join(sorted(arrays)) or 'no arrays'}; the model takes {', '.join(names)}: give one array for each "
            f"input by its name, and {_LABELS} if there are any."
        )
    whole = all(arrays[spec.name].ndim == len(spec.shape) + 1 for spec in signature.inputs)
    for spec in signature.inputs:
        _check(path, spec, arrays[spec.name], signature, whole=whole)
    counts = {name: len(array) for name, array in arrays.items()}
    if labels is not None:
        counts[_LABELS] = len(labels) if labels.ndim else 0
    sizes = set(counts.values())
    if len(sizes) > 1 or 0 in sizes:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise RecipeError(
            f"{path} has arrays of unequal or no samples ({told}); the first axis of all counts the same samples."
        )
    if labels is not None and (labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer)):
        raise RecipeError(
            f"{path}: {_LABELS} are {labels.dtype} of shape {labels.shape}; they are whole numbers, one class a sample."
        )
    if whole:
        if labels is not None:
            raise RecipeError(
                f"{path} has whole calls for samples, one axis more than the model's inputs have: {_LABELS} go with rows of inputs. Leave "
                "them out, and outputs are compared with the original's."
            )
        return SampleArrays(path=path, inputs=arrays, labels=None, rows=1, whole=True)
    fixed = {spec.shape[0] for spec in signature.inputs if isinstance(spec.shape[0], int)}
    rows = int(max(fixed, default=1))
    if len(fixed) > 1 or sizes.pop() % rows:
        raise RecipeError(
            f"{path} has {next(iter(counts.values()))} samples, and the model takes {' and '.join(map(str, sorted(fixed)))} at a time: "
            "give a multiple of that, or a model with a symbolic first axis."
        )
    return SampleArrays(path=path, inputs=arrays, labels=None if labels is None else labels.astype(np.int64), rows=rows)


def refuse_overlap(evaluation: SampleArrays, calibration: SampleArrays) -> None:
    """Raises RecipeError where both have a sample."""
    _refuse_shared((evaluation.path, evaluation.inputs), (calibration.path, calibration.inputs))


def check_arrays(evaluation: Path | None, calibration: Path | None) -> None:
    """What can be said of files before the model's inputs are known. Raises RecipeError.

    Labels are compared too where both files have them, since they could be an input.
    """
    read = [(path, _read(path)) for path in (evaluation, calibration) if path is not None]
    if len(read) < 2:
        return
    names = read[0][1].keys() & read[1][1].keys()
    if names == {_LABELS}:  # their inputs are not the same: it is said later
        return
    counts = [{array.shape[:1] for array in (arrays[name] for name in names)} for _, arrays in read]
    if all(len(sizes) == 1 and () not in sizes for sizes in counts):  # else it is said later what is wrong
        one, other = ((path, {name: arrays[name] for name in names}) for path, arrays in read)
        _refuse_shared(one, other)


def _refuse_shared(one: tuple[Path, Arrays], other: tuple[Path, Arrays]) -> None:
    both = len(_digests(one[1]) & _digests(other[1]))
    if both:
        raise RecipeError(
            f"{both} samples are both in {one[0]} and in {other[0]}: what a model is calibrated on cannot judge it. "
            "Take them out of one of the files."
        )


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    if path.suffix not in (".npz", ".safetensors"):
        raise RecipeError(
            f"{path} does not go with a plain module or an .onnx file, which take arrays: give .npz (numpy.savez) or .safetensors."
        )
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("it is one array without a name (numpy.save); numpy.savez names them")
            return {name: _native(file[name]) for name in file.files}
    except ArtifactError as error:
        raise RecipeError(str(error)) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        why = "it holds no plain arrays" if "pickle" in str(error) else error  # NumPy would advise to trust the file
        raise RecipeError(f"{path} cannot be read as arrays of numbers: {why}.") from None


def _native(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """In this machine's byte order."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _check(path: Path, spec: TensorSpec, array: npt.NDArray[Any], signature: Signature, *, whole: bool) -> None:
    if not spec.shape and not whole:
        raise RecipeError(
            f"{path}: the model's {spec.name} is a single number, with no axis that counts samples: give each input one axis more than the "
            "model takes, the first, which counts calls."
        )
    rest = spec.shape if whole else spec.shape[1:]
    fits = array.ndim == 1 + len(rest) and array.dtype.name == host_dtype(spec.dtype)
    for axis, size in zip(rest, array.shape[1:], strict=False):
        low, high = signature.axes.get(axis, (1, size)) if isinstance(axis, str) else (axis, axis)
        fits = fits and low <= size <= high
    if not fits:
        wanted = ", ".join(map(str, ("samples", *rest)))
        raise RecipeError(
            f"{path}: {spec.name} is {array.dtype.name} of shape {array.shape}; the model takes {host_dtype(spec.dtype)} of shape ({wanted})."
        )
    if np.issubdtype(array.dtype, np.floating) and (np.isnan(array) | np.isposinf(array)).any():
        raise RecipeError(
            f"{path}: {spec.name} holds numbers that are not finite; take samples without NaN and infinity (minus infinity, which masks, "
            "may be there)."
        )
    if spec.bounds is not None and array.size and not spec.bounds[0] <= array.min() <= array.max() <= spec.bounds[1]:
        raise RecipeError(
            f"{path}: {spec.name} goes from {array.min()} to {array.max()}; the model takes {spec.bounds[0]} to {spec.bounds[1]}."
        )


def _digests(arrays: Arrays) -> set[bytes]:
    found = set()
    for index in range(len(next(iter(arrays.values())))):
        digest = hashlib.sha256()
        for _, array in sorted(arrays.items()):
            digest.update(np.ascontiguousarray(array[index]).tobytes())
        found.add(digest.digest())
    return found
