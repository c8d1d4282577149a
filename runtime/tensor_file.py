"""Reads a safetensors file with numpy alone, so that a device needs no further package.

Format: 8 bytes little-endian length of the header, the header as JSON ({name: {dtype, shape, data_offsets}}), raw data.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.errors import ArtifactError

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}


def read_tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors of a file by name, which may be written to. Raises ArtifactError where the file is garbled."""
    try:
        return _parsed(bytearray(path.read_bytes()))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}.") from None


def tensors_of(content: bytes | bytearray, *, where: object) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors of a file's content by name; `where` names the file in errors. Raises ArtifactError where it is garbled."""
    try:
        return _parsed(content)
    except ValueError as error:
        raise ArtifactError(
            f"{where} is not a readable safetensors file ({error}); build the artifact again."
        ) from None


def _parsed(content: bytes | bytearray) -> dict[str, np.ndarray[Any, Any]]:
    """Raises ValueError that says what is wrong."""
    try:
        length = int.from_bytes(content[:8], "little")
        if 8 + length > len(content):
            raise ValueError("the header is longer than the file")
        header = json.loads(content[8 : 8 + length])
        data = memoryview(content)[8 + length :]
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"tensor {name} is {entry['dtype']}, which numpy does not have")
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            if not 0 <= start <= end <= len(data) or end - start != math.prod(entry["shape"]) * dtype.itemsize:
                raise ValueError(f"tensor {name} does not fit the file")
            tensors[name] = np.frombuffer(data[start:end], dtype).reshape(entry["shape"])
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return tensors
