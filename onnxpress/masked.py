"""Masked answers: numbers that stand for minus infinity, and would hide all others by their size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_LEAST = -1e4  # a mask's number is that or lower
_HALF = -65504.0  # the lowest of float16, which lower ones become there


def unmasked(arrays: Sequence[npt.NDArray[Any]], like: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """The arrays with minus infinity for what is masked, by what masks `like`.

    That is its lowest number, where it is there more than once, and far from all others.
    """
    lowest = min((float(array.min(initial=0.0, where=np.isfinite(array))) for array in like), default=0.0)
    if lowest > _LEAST:
        return list(arrays)
    limit = 0.999 * max(lowest, _HALF)
    masks, largest = 0, 0.0
    for array in like:
        below = array <= 0.999 * lowest
        masks += int((below & np.isfinite(array)).sum())
        largest = max(largest, float(np.abs(array).max(initial=0.0, where=~below & np.isfinite(array))))
    if masks < 2 or largest > 0.1 * abs(limit):
        return list(arrays)
    return [np.where(array <= limit, array.dtype.type(-np.inf), array) for array in arrays]
