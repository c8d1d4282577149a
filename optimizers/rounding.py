"""Rounds float weights to integers: per output channel, or in blocks along the input axis.

Round-to-nearest on symmetric ranges. Layouts are those of ONNX Runtime's operators (named at each function).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int8] | npt.NDArray[np.uint8]


def per_channel_8bit(weight: Float, *, reduce_range: bool) -> tuple[Integers, Float, Integers]:
    """Symmetric 8-bit integers for each output channel.

    weight: (in, out). Returns integers (in, out), scales (out,) float32 and zero points (out,).

    The integers are uint8 around 128. On x86 CPUs without VNNI, kernels for unsigned activations and signed weights add
    two products in 16 bits, which overflow; those for unsigned weights do not, and where there is VNNI both are the
    same kernel. reduce_range: int8 of 7 bits, with which the faster kernel cannot overflow.
    """
    limit = 63 if reduce_range else 127
    scales = np.abs(weight).max(axis=0) / limit
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    integers = np.clip(np.rint(weight / scales), -limit, limit)
    if reduce_range:
        return integers.astype(np.int8), scales, np.zeros(scales.shape, np.int8)
    return (integers + 128).astype(np.uint8), scales, np.full(scales.shape, 128, np.uint8)


def activation_uint8(low: float, high: float) -> tuple[Float, npt.NDArray[np.uint8]]:
    """Scale and zero point (both shape ()) that map [low, high], widened to contain 0, to 0 … 255."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return np.array(scale, np.float32), np.array(np.clip(round(-low / scale), 0, 255), np.uint8)


def blocks(weight: Float, *, bits: int, block_size: int) -> tuple[npt.NDArray[np.uint8], Float]:
    """Symmetric integers in blocks along the input axis, zero point 2^(bits-1).

    weight: (out, in), `in` divisible by block_size. Returns the packed bytes (out, in / block_size,
    block_size * bits / 8) and scales (out, in / block_size): the layout of com.microsoft MatMulNBits, and, reshaped to
    (out, in * bits / 8), of GatherBlockQuantized. The value of largest magnitude of each block maps to the end of the
    range exactly.
    """
    assert bits in (4, 8)
    rows, columns = weight.shape
    assert columns % block_size == 0
    half = 1 << (bits - 1)
    blocked = weight.reshape(rows, columns // block_size, block_size)
    extreme = np.take_along_axis(blocked, np.abs(blocked).argmax(-1, keepdims=True), -1)
    scales = np.where(extreme != 0, extreme / -half, 1).astype(np.float32)
    integers = np.clip(np.rint(blocked / scales) + half, 0, 2 * half - 1).astype(np.uint8)
    if bits == 4:
        integers = integers[..., 0::2] | (integers[..., 1::2] << 4)
    return np.ascontiguousarray(integers), scales[..., 0]


def block_size_for(columns: int, *, preferred: int) -> int | None:
    """The largest block size up to `preferred` that divides the input width; None where none of 16 … does."""
    size = preferred
    while size >= 16:
        if columns % size == 0:
            return size
        size //= 2
    return None
