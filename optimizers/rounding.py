"""Rounds float weights to integers: per output channel, or in blocks along the input axis.

Round-to-nearest; the ranges of blocks may be searched for the least squared error. Layouts are those of ONNX Runtime's
operators (named at each function).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a block's range that a search tries
_ELEMENTS_AT_ONCE = 1 << 20  # of a weight; bounds the memory of a search


def per_channel_8bit(weight: Float, *, limit: int) -> tuple[npt.NDArray[np.int8], Float, npt.NDArray[np.int8]]:
    """Symmetric int8 for each output channel.

    weight: (in, out). limit: the largest integer, 127 or less. Returns integers (in, out), scales (out,) float32 and zero points
    (out,), all 0.
    """
    scales = np.abs(weight).max(axis=0) / limit
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    integers = np.clip(np.rint(weight / scales), -limit, limit)
    return integers.astype(np.int8), scales, np.zeros(scales.shape, np.int8)


def activation_uint8(low: float, high: float) -> tuple[Float, npt.NDArray[np.uint8]]:
    """Scale and zero point (both shape ()) that map [low, high], widened to contain 0, to 0 … 255."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return np.array(scale, np.float32), np.array(np.clip(round(-low / scale), 0, 255), np.uint8)


def rounded_uint8(numbers: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.float64]:
    """What numbers are after `activation_uint8` has rounded them."""
    scale, zero_point = activation_uint8(low, high)
    zero = int(zero_point)
    return np.asarray((np.clip(np.rint(numbers / float(scale)) + zero, 0, 255) - zero) * float(scale))


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Integers in blocks along the input axis, as com.microsoft MatMulNBits reads them.

    packed: uint8 (out, in / block_size, block_size * bits / 8), lower bits first; reshaped to (out, in * bits / 8) it is
    GatherBlockQuantized's layout. scales: float32 (out, in / block_size). zero_points: uint8 (out, ceil(in / block_size * bits
    / 8)), packed alike, or None where all are 2^(bits-1).
    """

    packed: npt.NDArray[np.uint8]
    scales: Float
    zero_points: npt.NDArray[np.uint8] | None


def blocks(weight: Float, *, bits: int, block_size: int, search: bool = False, symmetric: bool = True) -> Blocks:
    """Round in blocks. weight: (out, in), `in` divisible by block_size.

    Symmetric: a block's value of largest magnitude maps to the end of the range exactly. Otherwise its smallest and largest
    value map to the two ends, 0 being among the integers' values. search: of several smaller ranges, which cut outliers
    off, each block takes the one of the least squared error.
    """
    scales, zeros = ranges(weight, bits=bits, block_size=block_size, search=search, symmetric=symmetric)
    integers = np.empty((*scales.shape, block_size), np.uint8)
    for part in _parts(weight):
        values = weight[part].reshape(-1, scales.shape[1], block_size)
        integers[part] = _rounded(values, scales[part], zeros[part], bits)
    return pack(integers, scales, None if symmetric else zeros, bits=bits)


def ranges(
    weight: Float,
    *,
    bits: int,
    block_size: int,
    search: bool = False,
    symmetric: bool = True,
    importance: Float | None = None,
) -> tuple[Float, Float]:
    """Scales and zero points, both float32 (out, in / block_size), that `blocks` rounds with.

    importance: (in,), what the squared errors of a search weigh; all the same where None.
    """
    assert bits in (4, 8)
    rows, columns = weight.shape
    assert columns % block_size == 0
    count = columns // block_size
    scales, zeros = np.empty((rows, count), np.float32), np.empty((rows, count), np.float32)
    find = _symmetric if symmetric else _asymmetric
    weighs = np.ones(columns, np.float32) if importance is None else importance
    for part in _parts(weight):
        values = weight[part].reshape(-1, count, block_size)
        scales[part], zeros[part] = find(values, bits, 1.0)
        least = np.full(values.shape[:2], np.inf, np.float32)
        for share in _SHARES if search else ():
            scale, zero = find(values, bits, share)
            errors = (_rounded(values, scale, zero, bits) - zero[..., None]) * scale[..., None] - values
            error = (np.square(errors) * weighs.reshape(count, block_size)).sum(-1)
            better = error < least
            least[better] = error[better]
            scales[part][better], zeros[part][better] = scale[better], zero[better]
    return scales, zeros


def pack(integers: npt.NDArray[np.uint8], scales: Float, zeros: Float | None, *, bits: int) -> Blocks:
    """Blocks of integers (out, in / block_size, block_size), scales and zero points (out, in / block_size)."""
    packed_zeros = None if zeros is None else _packed(zeros.astype(np.uint8), bits)
    return Blocks(packed=_packed(integers, bits), scales=scales, zero_points=packed_zeros)


def unpack(found: Blocks, *, bits: int, block_size: int) -> Float:
    """The weights (out, in) that blocks stand for."""
    rows, count = found.scales.shape
    integers = _unpacked(found.packed, bits)
    if found.zero_points is None:
        zeros = np.full((rows, count), 1 << (bits - 1), np.uint8)
    else:
        zeros = _unpacked(found.zero_points, bits)[:, :count]
    values: Float = (integers.astype(np.float32) - zeros[..., None]) * found.scales[..., None]
    return values.reshape(rows, count * block_size)


def _parts(weight: Float) -> list[slice]:
    """Rows that are worked on at a time."""
    rows, columns = weight.shape
    at_once = max(1, _ELEMENTS_AT_ONCE // columns)
    return [slice(start, start + at_once) for start in range(0, rows, at_once)]


def _rounded(values: Float, scale: Float, zero: Float, bits: int) -> Float:
    """Integers like `values` (rows, blocks, block_size); scale and zero point (rows, blocks)."""
    found: Float = np.clip(np.rint(values / scale[..., None]) + zero[..., None], 0, (1 << bits) - 1)
    return found


def _symmetric(values: Float, bits: int, share: float) -> tuple[Float, Float]:
    half = 1 << (bits - 1)
    extreme = np.take_along_axis(values, np.abs(values).argmax(-1, keepdims=True), -1)[..., 0]
    scale = np.where(extreme != 0, extreme * np.float32(share) / -half, 1).astype(np.float32)
    return scale, np.full(scale.shape, half, np.float32)


def _asymmetric(values: Float, bits: int, share: float) -> tuple[Float, Float]:
    largest = (1 << bits) - 1
    low, high = np.minimum(values.min(-1), 0) * share, np.maximum(values.max(-1), 0) * share
    scale = np.where(high > low, (high - low) / largest, 1).astype(np.float32)
    return scale, np.clip(np.rint(-low / scale), 0, largest).astype(np.float32)


def _packed(integers: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Two 4-bit integers a byte along the last axis, the first in the lower half; a missing last one is 0."""
    if bits == 8:
        return np.ascontiguousarray(integers)
    if integers.shape[-1] % 2:
        integers = np.concatenate([integers, np.zeros_like(integers[..., :1])], axis=-1)
    return np.ascontiguousarray(integers[..., 0::2] | (integers[..., 1::2] << 4))


def _unpacked(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def block_size_for(columns: int, *, preferred: int) -> int | None:
    """The largest block size up to `preferred` that divides the input width; None where none of 16 … does."""
    size = preferred
    while size >= 16:
        if columns % size == 0:
            return size
        size //= 2
    return None
