"""Rounds weights so that the layer's answers, and not the weights, stay as near as they can.

Given the second moments of a layer's inputs, the rounding of each input's weights is made up for by the weights of the inputs that
are still to be rounded (GPTQ, arXiv 2210.17323), the inputs with the most energy first; and inputs may be scaled against their
weights so that those of large inputs are rounded finely (AWQ, arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from onnxpress.optimizers.rounding import Blocks, Float, pack, ranges, unpack

_DAMPING = 0.01  # of the mean energy, added to every input's: keeps inverses finite
_STRIP = 128  # inputs after whose rounding all later weights are updated at once
_POWERS = tuple(step / 10 for step in range(1, 10))


def blocks_with_feedback(
    weight: Float, moments: Float, *, bits: int, block_size: int, search: bool = False, symmetric: bool = True
) -> Blocks:
    """As `rounding.blocks`, with error feedback. weight: (out, in); moments: (in, in), the inputs' mean x xᵀ."""
    rows, columns = weight.shape
    energy = moments.diagonal()
    scales, zeros = ranges(
        weight, bits=bits, block_size=block_size, search=search, symmetric=symmetric, importance=energy
    )
    order = np.argsort(-energy, kind="stable")
    spread = error_spread(moments[np.ix_(order, order)])
    rest = weight.T[order].astype(np.float32)  # (in, out)
    rounded = np.empty((columns, rows), np.uint8)
    for start in range(0, columns, _STRIP):
        end = min(start + _STRIP, columns)
        errors = np.empty((end - start, rows), np.float32)
        for place in range(start, end):
            block = order[place] // block_size
            scale, zero = scales[:, block], zeros[:, block]
            values = np.clip(np.rint(rest[place] / scale) + zero, 0, (1 << bits) - 1)
            rounded[order[place]] = values
            error = (rest[place] - (values - zero) * scale) / spread[place, place]
            errors[place - start] = error
            rest[place + 1 : end] -= np.outer(spread[place, place + 1 : end], error)
        rest[end:] -= spread[start:end, end:].T @ errors
    integers = np.ascontiguousarray(rounded.T).reshape(rows, -1, block_size)
    return pack(integers, scales, None if symmetric else zeros, bits=bits)


def error_spread(moments: Float) -> Float:
    """U, where Uᵀ U is the inverse of the moments (in, in): its rows say how an error at one input is spread over the later ones."""
    spread: Float = np.linalg.cholesky(inverse(moments)).T.astype(np.float32)
    return spread


def inverse(moments: Float) -> npt.NDArray[np.float64]:
    """Of moments (in, in), with a little energy added to every input's, so that it is finite: float64 (in, in)."""
    damped = moments.astype(np.float64)
    damped.flat[:: len(moments) + 1] += (_DAMPING * moments.diagonal().mean()) or 1.0
    return np.asarray(np.linalg.inv(damped), np.float64)


def channel_scales(
    weight: Float, moments: Float, rounder: Callable[[Float], Blocks], *, bits: int, block_size: int
) -> Float | None:
    """What to multiply each input's weights by before they are rounded, and to divide the inputs by: float32 (in,).

    Powers of the inputs' root mean square are tried; None where leaving the weights as they are gives the least error.
    """
    size = np.sqrt(np.maximum(moments.diagonal(), 0))
    size = np.maximum(size / max(float(size.mean()), 1e-30), 1e-4)

    def error(scales: Float) -> float:
        found = unpack(rounder(weight * scales), bits=bits, block_size=block_size) / scales - weight
        return float(np.einsum("oi,oi->", found @ moments, found))

    least, best = error(np.ones_like(size)), None
    for power in _POWERS:
        scales = (size**power).astype(np.float32)
        scales /= np.sqrt(scales.max() * scales.min())
        if (found := error(scales)) < least:
            least, best = found, scales
    return best
