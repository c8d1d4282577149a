"""Masked answers: numbers that stand for "never" (-1e4, -1e9, float's lowest), and would hide all others by their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MASKS_FROM = 512.0
HALF_LARGEST = 65504.0  # float16's, which larger masks become there
OF_A_MASK = 0.7  # so large a share of a mask is masked as well: scores are added to it, and half precision rounds it
_LEAST = math.frexp(MASKS_FROM)[1]
_OFFSET = 1100  # float64's least exponent is -1073
_MOST_LEVELS = 16
_NARROW = 2.0**-8  # a level's width as a share of it: bfloat16 rounds so


def mask_size(arrays: Sequence[npt.NDArray[Any]], *, repeated: int = 3) -> float:
    """The size from which finite numbers are masks; infinity where none are.

    A mask is one of a few large numbers, perhaps plus a score; no number lies within a factor of two between scores and masks.
    repeated: the least mean number of times that each of the few occurs; distances between few points occur twice.
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


def largest_unmasked(array: npt.NDArray[Any], masks: float | None = None) -> float:
    """The largest size of what is neither infinite nor a mask; 0 where nothing is. masks: from which size on numbers are; else the array tells."""
    sizes = np.abs(array.astype(np.float64))
    masks = mask_size([sizes], repeated=1) if masks is None else masks
    return float(sizes.max(initial=0.0, where=np.isfinite(sizes) & (sizes < masks)))


def _are_levels(arrays: Sequence[npt.NDArray[Any]], size: float, repeated: int) -> bool:
    """Whether numbers of a size and more are a few, with scores of the others' size added."""
    large, largest, count = [], 0.0, 0
    for array in arrays:
        sizes, finite = np.abs(array), np.isfinite(array)
        chosen = array[(sizes >= size) & finite]
        count += len(chosen)
        large.append(np.unique(chosen))  # they may be millions, and are few different ones
        largest = max(largest, float(sizes.max(initial=0.0, where=sizes < size)))
    numbers = np.unique(np.concatenate(large)).astype(np.float64)
    apart = np.diff(numbers) > 2 * largest + _NARROW * np.abs(numbers[1:])
    levels = np.split(numbers, np.flatnonzero(apart) + 1)
    narrow = all(level[-1] - level[0] <= 4 * largest + _NARROW * abs(level[-1]) for level in levels)
    return narrow and len(levels) <= _MOST_LEVELS and count >= repeated * len(levels)


@dataclass(frozen=True)
class Masks:
    """places: which numbers of an answer, flat, may be masks, and are no large quantities; None where all are small. size: from which on those are."""

    places: npt.NDArray[np.bool_] | None
    size: float

    def among(self, answer: npt.NDArray[Any], places: slice) -> npt.NDArray[np.bool_]:
        """Which numbers are masks, of a part of an answer, flat along the last axis."""
        if self.places is None:
            return np.zeros(answer.shape, np.bool_)
        return np.asarray(np.isfinite(answer) & (np.abs(answer) >= self.size) & self.places[places])

    def quantities(self, places: slice) -> npt.NDArray[np.bool_]:
        """Which numbers, of a part of an answer, are large for all samples and vary."""
        return np.zeros(1, np.bool_) if self.places is None else ~self.places[places]


def masks_of(answers: Sequence[npt.NDArray[Any]]) -> Masks:
    """What tells the masks of an output by its answers to many samples, flat, all of one size."""
    possible = _may_be_masked(answers)
    return Masks(possible, math.inf if possible is None else mask_size([array[possible] for array in answers]))


def _may_be_masked(answers: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.bool_] | None:
    """Which numbers could be masks for some samples: not those that are large for all, or nearly, and vary, as quantities do. None where all are small."""
    if all(array.size == 0 or (array.min() > -MASKS_FROM and array.max() < MASKS_FROM) for array in answers):
        return None
    dtype = answers[0].dtype
    least, most = np.full(answers[0].shape, np.inf, dtype), np.zeros(answers[0].shape, dtype)
    for array in answers:
        sizes = np.where(np.isfinite(array), np.abs(array), 0)
        np.minimum(least, sizes, out=least)
        np.maximum(most, sizes, out=most)
    large = (most >= MASKS_FROM) & (least > np.minimum(most / 2, MASKS_FROM))
    return np.asarray(~(large & (least < (1 - 1e-6) * most)))
