"""Writes golden inputs and outputs, by which an artifact can be checked anywhere.

File format: safetensors, keys "input.CASE.NAME" and "output.CASE.NAME". The tolerance allows for other processors'
kernels: 1e-3 of an output's largest value for float graphs, 5e-2 for quantized ones, where one activation that rounds
the other way moves an answer by a quantization step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from onnxpress.manifest import Arrays, Runnable

_EXACT, _QUANTIZED = 1e-3, 5e-2


def write_golden(path: Path, session: Runnable, cases: Mapping[str, Arrays], *, exact: bool) -> dict[str, float]:
    """Run the cases, write them with their outputs, and return the allowed absolute difference for each output."""
    tensors: dict[str, np.ndarray] = {}
    largest: dict[str, float] = {}
    for case, feeds in cases.items():
        for name, array in feeds.items():
            tensors[f"input.{case}.{name}"] = np.asarray(array, order="C")
        for name, array in session.run(feeds).items():
            tensors[f"output.{case}.{name}"] = np.asarray(array, order="C")
            largest[name] = max(largest.get(name, 0.0), float(np.abs(array).max(initial=0)))
    save_file(tensors, path)
    share = _EXACT if exact else _QUANTIZED
    return {name: float(f"{share * max(value, 1e-3):.3g}") for name, value in largest.items()}
