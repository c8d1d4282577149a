"""Arrays in a card's memory, and the inputs and outputs of a session that stay there.

ONNX Runtime allocates the memory (OrtValue) and runs on addresses; copies between two places on the card go through NVIDIA's
driver, which is there wherever the provider is. Source: CUDA Driver API, memory management.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxpress.errors import ProviderError
from onnxpress.runtime.bfloat16 import BFLOAT16, ONNX_BFLOAT16
from onnxpress.runtime.nvidia import load_driver

# Held by whatever uses a card: while a CUDA graph is captured, no other thread may allocate or copy there.
ON_CARD = threading.RLock()

Dtype = str | np.dtype[Any]

_ON_DEVICE = 2  # CU_MEMORYTYPE_DEVICE


def item_bytes(dtype: Dtype) -> int:
    """Bytes of one number."""
    return 2 if str(dtype) == BFLOAT16 else np.dtype(dtype).itemsize


def _element_type(dtype: Dtype) -> Any:
    """As ONNX Runtime takes it."""
    return ONNX_BFLOAT16 if str(dtype) == BFLOAT16 else np.dtype(dtype).type


class Memory(Protocol):
    """Where the cache of a language model lies. Arrays have rows along their first axis and tokens along their third."""

    def zeros(self, shape: Sequence[int], dtype: Dtype) -> Any:
        """A new array."""
        ...

    def copy(self, source: Any, row: int, target: Any, to_row: int, length: int) -> None:
        """Copy the first tokens of one array's row into another's."""
        ...


class HostMemory:
    """numpy's."""

    def zeros(self, shape: Sequence[int], dtype: Dtype) -> npt.NDArray[Any]:
        """A new array."""
        return np.zeros(tuple(shape), dtype)

    def copy(self, source: npt.NDArray[Any], row: int, target: npt.NDArray[Any], to_row: int, length: int) -> None:
        """Copy the first tokens of one array's row into another's."""
        target[to_row, :, :length] = source[row, :, :length]


class DeviceArray:
    """A contiguous array on a card. Slices of the first axis share its memory."""

    def __init__(self, owner: Any, shape: tuple[int, ...], dtype: Dtype, address: int, device_id: int) -> None:
        self._owner = owner  # the OrtValue that frees the memory when nobody refers to it any more
        self.shape = shape
        self.dtype = dtype
        self.address = address
        self.device_id = device_id

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * item_bytes(self.dtype)

    def __getitem__(self, rows: slice) -> DeviceArray:
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1
        shape = (max(0, stop - start), *self.shape[1:])
        return DeviceArray(self._owner, shape, self.dtype, self.address + start * self.row_bytes, self.device_id)

    def write(self, array: npt.NDArray[Any]) -> None:
        """Copy a numpy array of the same shape and dtype in; only for arrays that are no slices."""
        with ON_CARD:
            self._owner.update_inplace(array)

    def numpy(self) -> npt.NDArray[Any]:
        """A copy of the whole array in the computer's memory; only for arrays that are no slices."""
        with ON_CARD:
            found: npt.NDArray[Any] = self._owner.numpy()
        return found

    def bind(self, how: Callable[..., None], name: str) -> None:
        """Bind it to an input or output by its address; how: an IOBinding's bind_input or bind_output."""
        how(name, "cuda", self.device_id, _element_type(self.dtype), self.shape, self.address)


@functools.cache
def device_memory(device_id: int) -> DeviceMemory:
    """The one of a card."""
    return DeviceMemory(device_id)


class DeviceMemory:
    """A card's. Raises ProviderError where the driver cannot."""

    def __init__(self, device_id: int) -> None:
        self.device_id = device_id
        self._driver = load_driver()
        device = ctypes.c_int()
        self._context = ctypes.c_void_p()
        self._check(self._driver.cuInit(0))
        self._check(self._driver.cuDeviceGet(ctypes.byref(device), device_id))
        self._check(self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device))  # ONNX Runtime's, too

    def empty(self, shape: Sequence[int], dtype: Dtype) -> DeviceArray:
        """A new array that holds anything."""
        from onnxruntime import OrtValue

        if 0 in shape:
            return DeviceArray(None, tuple(shape), dtype, 0, self.device_id)
        try:
            with ON_CARD:
                owner = OrtValue.ortvalue_from_shape_and_type(
                    tuple(shape), _element_type(dtype), "cuda", self.device_id
                )
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            size = int(np.prod(shape, dtype=np.int64)) * item_bytes(dtype)
            raise ProviderError(
                f"{size} bytes of the memory of card {self.device_id} were asked for, and ONNX Runtime does not get them "
                f"({' '.join(str(error).split())[:200]}): ask for less (cache_bytes, smaller batches), or free memory there."
            ) from error
        return DeviceArray(owner, tuple(shape), dtype, owner.data_ptr(), self.device_id)

    def zeros(self, shape: Sequence[int], dtype: Dtype) -> DeviceArray:
        """A new array."""
        array = self.empty(shape, dtype)
        size = array.shape[0] * array.row_bytes
        if size:
            start, zero = ctypes.c_uint64(array.address), ctypes.c_ubyte(0)
            self._do(lambda: self._driver.cuMemsetD8_v2(start, zero, ctypes.c_size_t(size)))
        return array

    def copy(self, source: DeviceArray, row: int, target: DeviceArray, to_row: int, length: int) -> None:
        """Copy the first tokens of one array's row, (heads, tokens, width), into another's."""
        heads, tokens, width = source.shape[1:]
        if not length:
            return
        token = width * item_bytes(source.dtype)
        plan = _Copy2D(
            source_kind=_ON_DEVICE,
            source=source.address + row * source.row_bytes,
            source_pitch=tokens * token,
            target_kind=_ON_DEVICE,
            target=target.address + to_row * target.row_bytes,
            target_pitch=target.shape[2] * token,
            width=length * token,
            height=heads,
        )
        self._do(lambda: self._driver.cuMemcpy2DUnaligned_v2(ctypes.byref(plan)))

    def _do(self, work: Callable[[], int]) -> None:
        """Work on the card, and wait: ONNX Runtime is done when a run returns, but its stream does not wait for the driver's."""
        with ON_CARD:
            self._check(self._driver.cuCtxSetCurrent(self._context))
            self._check(work())
            self._check(self._driver.cuCtxSynchronize())

    def _check(self, status: int) -> None:
        if status:
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(name))
            reason = name.value.decode() if name.value else status
            raise ProviderError(f"NVIDIA's driver fails on card {self.device_id}: {reason}.")


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D: rows of `width` bytes, each `pitch` bytes after the one before."""

    _fields_ = [
        ("source_x", ctypes.c_size_t),
        ("source_y", ctypes.c_size_t),
        ("source_kind", ctypes.c_int),
        ("source_host", ctypes.c_void_p),
        ("source", ctypes.c_uint64),
        ("source_array", ctypes.c_void_p),
        ("source_pitch", ctypes.c_size_t),
        ("target_x", ctypes.c_size_t),
        ("target_y", ctypes.c_size_t),
        ("target_kind", ctypes.c_int),
        ("target_host", ctypes.c_void_p),
        ("target", ctypes.c_uint64),
        ("target_array", ctypes.c_void_p),
        ("target_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    ]
