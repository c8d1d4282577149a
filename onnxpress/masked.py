"""Masked answers: numbers that stand for "never" (-1e4, -1e9, float's lowest), and would hide all others by their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MASKS_FROM = 512.0
_LEAST = math.frexp(MASKS_FROM)[1]
_OFFSET = 1100  # float64's least exponent is -1073
_MOST_LEVELS = 16
_NARROW = 2.0**-8  # a level's width as a share of it: bfloat16 rounds so


def mask_size(arrays: Sequence[npt.NDArray[Any]], *, repeated: int = 1) -> float:
    """The size from which finite numbers are masks; infinity where none are.

    Masks are few numbers, perhaps with scores added to them that are no larger than the unmasked are; between both at least a factor of
    two is empty. repeated: how often each of the few is there at least.
    """
    counts = np.zeros(2 * _OFFSET, np.int64)
    for array in arrays:
        finite = array[np.isfinite(array) & (array != 0)]
        counts += np.bincount(np.frexp(finite)[1] + _OFFSET, minlength=2 * _OFFSET)
        counts[0] += array.size - finite.size
    for exponent in np.flatnonzero(counts) - _OFFSET:
        empty = counts[exponent - 1 + _OFFSET] == 0
        if exponent >= _LEAST and empty and counts[: exponent + _OFFSET].any():
            size = math.ldexp(0.5, int(exponent))
            if _are_levels(arrays, size, repeated):
                return size
    return math.inf


def _are_levels(arrays: Sequence[npt.NDArray[Any]], size: float, repeated: int) -> bool:
    """Whether numbers of a size and more are a few, with scores of the others' size added."""
    large, largest = [], 0.0
    for array in arrays:
        sizes, finite = np.abs(array), np.isfinite(array)
        large.append(array[(sizes >= size) & finite].astype(np.float64))
        largest = max(largest, float(sizes.max(initial=0.0, where=sizes < size)))
    numbers = np.sort(np.concatenate(large))
    apart = np.diff(numbers) > 2 * largest + _NARROW * np.abs(numbers[1:])
    levels = np.split(numbers, np.flatnonzero(apart) + 1)
    return len(levels) <= _MOST_LEVELS and all(
        len(level) >= repeated and level[-1] - level[0] <= 4 * largest + _NARROW * abs(level[-1]) for level in levels
    )
