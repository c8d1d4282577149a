"""Chooses the range that an activation's integers cover from what it held on the calibration inputs.

min-max      all of it: nothing is cut off, and one outlier makes every step coarse
percentile   but for a share of the numbers at each end
entropy      the range whose integers' distribution is nearest to the original's (least Kullback-Leibler divergence), as in NVIDIA's
             "8-bit inference with TensorRT" (GTC 2017), here for ranges that need not be symmetric too
mse          the range with the least mean squared error, numbers cut off included
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.errors import RecipeError
from onnxpress.optimizers.base import Distribution

METHODS = ("min-max", "percentile", "entropy", "mse")
PERCENTILE = 99.99  # that percentile keeps where nothing is said
_FEWEST = 128  # bins that a range has at least, as TensorRT's calibration has it
_SHARES = np.geomspace(1.0, 0.02, 80)  # of the whole range that a search tries

Numbers = npt.NDArray[np.float64]
# Numbers → what their integers stand for, for a range (low, high).
Rounding = Callable[[Numbers, float, float], npt.NDArray[Any]]


def check_method(name: str, method: str, percentile: float) -> None:
    """Raises RecipeError where a pass's options are none of those above."""
    if method not in METHODS:
        raise RecipeError(f"Pass {name!r}: calibration is {method!r}; it takes {', '.join(METHODS)}.")
    if not 90.0 <= percentile <= 100.0:
        raise RecipeError(f"Pass {name!r}: percentile is {percentile}; it takes 90 to 100, e.g. 99.99.")
    if percentile != PERCENTILE and method != "percentile":
        raise RecipeError(
            f"Pass {name!r}: percentile is read where calibration is percentile, and it is {method!r}; set it too, or leave "
            "percentile out."
        )


def chosen_range(
    distribution: Distribution, method: str, *, percentile: float, rounding: Rounding
) -> tuple[float, float]:
    """The range (low, high), never wider than what was seen."""
    low, high = distribution.low, distribution.high
    if method == "min-max" or low == high:
        return low, high
    edges = np.linspace(-distribution.limit, distribution.limit, len(distribution.counts) + 1)
    seen = np.flatnonzero(distribution.counts)
    counts = distribution.counts[seen].astype(np.float64)
    centres = ((edges[:-1] + edges[1:]) / 2)[seen].clip(low, high)
    if method == "percentile":
        return _percentile(centres, counts, percentile, low, high)
    measure = _squared_error
    if method == "entropy":
        # What a Relu cut to 0, or a GELU to next to it, is exact in any range, and would outweigh the rest.
        measure = _divergence
        counts[np.isin(seen - len(distribution.counts) // 2, (-1, 0))] = 0
        seen = np.flatnonzero(counts)
        centres, counts = centres[seen], counts[seen]

    def cost(tried: tuple[float, float]) -> float:
        return measure(centres, counts, rounding(centres, *tried), tried)

    best = (low, high)
    for narrowed in (_both, _upper, _lower):  # then one end after the other: tails are rarely alike
        best = min((narrowed(best, float(share)) for share in _SHARES), key=cost)
    return best


def _both(found: tuple[float, float], share: float) -> tuple[float, float]:
    return found[0] * share, found[1] * share


def _upper(found: tuple[float, float], share: float) -> tuple[float, float]:
    return found[0], found[1] * share if found[1] > 0 else found[1]


def _lower(found: tuple[float, float], share: float) -> tuple[float, float]:
    return found[0] * share if found[0] < 0 else found[0], found[1]


def _percentile(centres: Numbers, counts: Numbers, percentile: float, low: float, high: float) -> tuple[float, float]:
    below = np.cumsum(counts) / counts.sum()
    tail = 1 - percentile / 100
    first = int(np.searchsorted(below, tail, side="right"))
    last = int(np.searchsorted(below, 1 - tail, side="left"))
    return max(low, min(float(centres[first]), 0.0)), min(high, max(float(centres[last]), 0.0))


def _squared_error(centres: Numbers, counts: Numbers, rounded: npt.NDArray[Any], tried: tuple[float, float]) -> float:
    return float((counts * np.square(rounded.astype(np.float64) - centres)).sum())


def _divergence(centres: Numbers, counts: Numbers, rounded: npt.NDArray[Any], tried: tuple[float, float]) -> float:
    """KL(P ‖ Q): P is what was seen, cut off at the range's ends, Q what is left of it after rounding.

    Each integer's numbers are spread evenly over the bins that it was made of; numbers beyond the range are in P alone, so that
    cutting them off costs.
    """
    inside = (centres >= min(tried[0], 0.0)) & (centres <= max(tried[1], 0.0))
    if inside.sum() < max(1, min(_FEWEST, len(inside) // 2)):  # what is rounded one bin by one is not divergent at all
        return np.inf
    original = counts[inside]
    original[0] += counts[: int(inside.argmax())].sum()
    original[-1] += counts[len(inside) - int(inside[::-1].argmax()) :].sum()
    _, step = np.unique(rounded[inside].astype(np.float64), return_inverse=True)
    kept = np.bincount(step, weights=counts[inside]) / np.bincount(step)
    p, q = original / original.sum(), kept[step] / counts[inside].sum()
    return float((p * np.log(p / q)).sum())
