"""Writes golden inputs and outputs, by which an artifact can be checked anywhere.

File format: safetensors, keys "input.CASE.NAME" and "output.CASE.NAME". The tolerance allows for other processors'
kernels: 1e-3 of an output's largest value for float graphs, 5e-2 for quantized ones, where one activation that rounds
the other way moves an answer by a quantization step, and all behind it; of integers and booleans, the same share may
differ. A quantized graph may elsewhere be as far from its answers here as these are from those of the graph in float:
of that size are the roundings that another kernel makes another way. The size of masked numbers (masked.py) would allow the
others anything: it does not count, and they are written as the infinity of their sign, which a number of any size passes for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from onnxpress.manifest import Arrays
from onnxpress.masked import Masks, mask_size
from onnxpress.runtime.loading import golden_difference
from onnxpress.runtime.session import Session

_EXACT, _QUANTIZED = 1e-3, 5e-2


def write_golden(
    path: Path,
    session: Session,
    cases: Mapping[str, Arrays],
    *,
    unrounded: Session | None,
    masks: Mapping[str, Masks] | None = None,
) -> dict[str, float]:
    """Run the cases, write them with their outputs, and return the `golden_difference` that is allowed for each output.

    unrounded: of a quantized graph, the one in float; it is not asked where it takes other inputs (another cache). masks: of outputs, where
    answers to many samples tell them; without, these few have to.
    """
    tensors: dict[str, np.ndarray] = {}
    largest: dict[str, float] = {}
    rounding: dict[str, float] = {}
    places: dict[tuple[str, str], np.ndarray] = {}
    share = _EXACT if unrounded is None else _QUANTIZED
    answers = {case: session.run(feeds) for case, feeds in cases.items()}
    for case, feeds in cases.items():
        for name, array in feeds.items():
            tensors[f"input.{case}.{name}"] = np.asarray(array, order="C")
        for name, answer in answers[case].items():
            masked = np.zeros(answer.shape, np.bool_)
            if np.issubdtype(answer.dtype, np.floating):
                others = [given[name] for given in answers.values()]
                masked = (
                    _lowest(answer, others)
                    if masks is None
                    else masks[name].among(answer.ravel()).reshape(answer.shape)
                )
                written = np.where(
                    masked & ~_exact_levels(answer, masked), np.copysign(answer.dtype.type(np.inf), answer), answer
                )
            else:
                written = answer
            tensors[f"output.{case}.{name}"] = np.asarray(written, order="C")
            largest[name] = max(largest.get(name, 0.0), _size(answer[~masked]))
            places[case, name] = masked
        if unrounded is not None and unrounded.signature.inputs == session.signature.inputs:
            for name, array in unrounded.run(feeds).items():
                written, masked = tensors[f"output.{case}.{name}"], places[case, name]
                difference = (
                    golden_difference(written[~masked], array[~masked]) if written.shape == array.shape else 0.0
                )
                rounding[name] = max(rounding.get(name, 0.0), difference if np.isfinite(difference) else 0.0)
    path.write_bytes(save(tensors))  # save_file has errors of its own for a full disk
    return {
        name: float(f"{max(share * max(value, 1e-3), rounding.get(name, 0.0)):.3g}") for name, value in largest.items()
    }


def _lowest(answer: np.ndarray, answers: list[np.ndarray]) -> np.ndarray:
    """What is masked by the answers to all cases: at least two numbers, and negative."""
    limit = -mask_size(answers)
    several = sum(int((np.isfinite(array) & (array <= limit)).sum()) for array in answers) > 1
    return np.asarray(np.isfinite(answer) & (answer <= limit) & several)


def _exact_levels(answer: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """Which masks are written as they are: positive ones where some come again to the last digit, as prices do that are only taken for masks."""
    positive = masked & (answer > 0)
    return positive & (len(np.unique(answer[positive])) < np.count_nonzero(positive))


def _size(array: np.ndarray) -> float:
    """The largest finite absolute value of floats; 1 for other numbers, whose difference is a share."""
    if not np.issubdtype(array.dtype, np.floating):
        return 1.0
    return float(np.abs(array[np.isfinite(array)]).max(initial=0))
