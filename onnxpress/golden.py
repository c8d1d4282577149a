"""Writes golden inputs and outputs, by which an artifact can be checked anywhere.

File format: safetensors, keys "input.CASE.NAME" and "output.CASE.NAME". The tolerance allows for other processors'
kernels: 1e-3 of an output's largest value for float graphs, 5e-2 for quantized ones, where one activation that rounds
the other way moves an answer by a quantization step, and all behind it; of integers and booleans, the same share may
differ. Another machine's kernels may round differently, and the most that rounding can do is about what quantization
did: the tolerance of a quantized graph is its distance from the float graph, where that is larger, and at most half of
the largest value: more would prove nothing (a token that goes to another expert is another token). Beside masked numbers
(masked.py), whose size would allow the others anything, each masked one may be off by the tolerance's share of itself.
Half precision may not hold them: beyond what it holds they are written as the infinity of their sign, which a number of
any size passes for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from onnxpress.manifest import Arrays
from onnxpress.masked import HALF_LARGEST, OF_A_MASK, largest_unmasked, mask_size
from onnxpress.runtime.loading import golden_difference
from onnxpress.runtime.session import Session

_EXACT, _QUANTIZED, _MOST = 1e-3, 5e-2, 0.5
_LEAST = 1e-3  # of numbers that are smaller than this, a share would ask for more than float32 has


@dataclass(frozen=True)
class Allowed:
    """tolerances: the `golden_difference` of each output. sizes: of outputs with masks, from which size on numbers count by their share."""

    tolerances: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)


def write_golden(
    path: Path,
    session: Session,
    cases: Mapping[str, Arrays],
    *,
    unrounded: Session | None,
    masks_from: Mapping[str, float] | None = None,
    half: bool = False,
) -> Allowed:
    """Run the cases, write them with their outputs, and return what is allowed for each output.

    unrounded: of a quantized graph, the one in float; it is not asked where it takes other inputs (another cache). masks_from: of outputs,
    the size of masks, where answers to many samples tell it; without, these few have to. half: the graph is of half precision.
    """
    answers = {case: session.run(feeds) for case, feeds in cases.items()}
    asked = unrounded is not None and unrounded.signature.inputs == session.signature.inputs
    in_float = {case: unrounded.run(feeds) if unrounded and asked else {} for case, feeds in cases.items()}
    tensors = {f"input.{case}.{name}": array for case, feeds in cases.items() for name, array in feeds.items()}
    allowed, share = Allowed(), _EXACT if unrounded is None else _QUANTIZED
    for name, first in next(iter(answers.values())).items():
        outputs = {case: given[name] for case, given in answers.items()}
        size, masks = 1.0, math.inf  # of other numbers than floats the difference is a share
        if np.issubdtype(first.dtype, np.floating):
            found = mask_size(list(outputs.values())) if masks_from is None else masks_from[name]
            masks = OF_A_MASK * min(found, HALF_LARGEST if half and found < math.inf else math.inf)
            size = max(_LEAST, *(largest_unmasked(array, masks) for array in outputs.values()))
        if masks < math.inf:
            allowed.sizes[name] = size
        tolerance = share * size
        for case, answer in outputs.items():
            if half and masks < math.inf:
                beyond = np.abs(answer) >= OF_A_MASK * HALF_LARGEST
                answer = np.where(beyond, np.copysign(answer.dtype.type(np.inf), answer), answer)
            tensors[f"output.{case}.{name}"] = answer
            if name in in_float[case] and in_float[case][name].shape == answer.shape:
                rounding = golden_difference(in_float[case][name], answer, allowed.sizes.get(name, math.inf))
                tolerance = max(tolerance, min(rounding, _MOST * size) if math.isfinite(rounding) else 0.0)
        allowed.tolerances[name] = float(f"{tolerance:.3g}")
    contiguous = {key: np.asarray(array, order="C") for key, array in tensors.items()}
    path.write_bytes(save(contiguous))  # save_file has errors of its own for a full disk
    return allowed
