"""bfloat16 for numpy, which does not have it: on the way in and out such numbers are float32.

A bfloat16 is the upper half of a float32; what is cut off is rounded to the nearest, ties to even.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.manifest import Arrays, Signature

BFLOAT16 = "bfloat16"  # as signatures call it
ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16


def has_bfloat16(signature: Signature) -> bool:
    """Whether an input or output is bfloat16."""
    return any(spec.dtype == BFLOAT16 for spec in (*signature.inputs, *signature.outputs))


def host_dtype(dtype: str) -> str:
    """numpy's name of what stands for a dtype of a signature here."""
    return "float32" if dtype == BFLOAT16 else dtype


def to_bits(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """float32 → the 16 bits of each bfloat16, of the same shape."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    nearest = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    found: npt.NDArray[np.uint16] = np.where(np.isnan(array), np.uint16(0x7FC0), nearest)
    return found


def from_bits(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The 16 bits of each bfloat16 → float32, of the same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def run(
    inner: Any, outputs: Sequence[str], feeds: Arrays, signature: Signature, options: Any
) -> list[npt.NDArray[Any]]:
    """As ONNX Runtime's `InferenceSession.run`, with float32 where the model has bfloat16."""
    from onnxruntime import OrtValue

    narrow = {spec.name for spec in signature.inputs if spec.dtype == BFLOAT16}
    given = {
        name: OrtValue.ortvalue_from_numpy_with_onnx_type(to_bits(array), ONNX_BFLOAT16)
        if name in narrow
        else OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        for name, array in feeds.items()
    }
    return [_array(value) for value in inner.run_with_ort_values(list(outputs), given, options)]


def _array(value: Any) -> npt.NDArray[Any]:
    if value.element_type() != ONNX_BFLOAT16:
        found: npt.NDArray[Any] = value.numpy()
        return found
    assert value.device_name() == "cpu"  # where a run brings what is not bound elsewhere
    bits = np.empty(value.shape(), np.uint16)
    ctypes.memmove(bits.ctypes.data, value.data_ptr(), bits.nbytes)
    return from_bits(bits)
