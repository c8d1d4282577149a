"""What of NVIDIA's is on this machine: the driver and its cards, and the libraries that a provider needs."""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
import struct
import sys
from pathlib import Path

from onnxpress.errors import ProviderError
from onnxpress.runtime.wheel import file_name

_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def check_loads(name: str, library: Path) -> None:
    """Load a provider's library from ONNX Runtime's wheel, or raise ProviderError naming all that it misses."""
    _preload()
    try:
        ctypes.CDLL(str(library.with_name(file_name("providers_shared"))), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        missing = missing_libraries(library)
        found = f"{', '.join(missing)} cannot be found" if missing else str(error)
        raise ProviderError(
            f"The provider {name} was asked for and does not load: {found}. {_remedy(missing)}, or ask for the provider cpu."
        ) from None


def check_card(name: str, device_id: int) -> None:
    """Raise ProviderError where the driver does not show the card: the libraries can be there without one."""
    try:
        driver = load_driver()
    except OSError as error:
        raise ProviderError(
            f"The provider {name} was asked for and there is no NVIDIA driver: {error}. Install it, or ask for cpu."
        ) from None
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0 or count.value == 0:
        raise ProviderError(
            f"The provider {name} was asked for and the NVIDIA driver shows no card (status {status}, {count.value} "
            "devices). Check nvidia-smi, or ask for the provider cpu."
        )
    if device_id >= count.value:
        there = "only 0" if count.value == 1 else f"0 to {count.value - 1}"
        raise ProviderError(f"The provider {name} was asked for with device_id {device_id}; this machine has {there}.")


def gpu_name(device_id: int) -> str:
    """Name and compute capability of a card as a file's name (NVIDIA-H200-sm90); unknown-gpu without a driver."""
    try:
        driver = load_driver()
    except OSError:
        return "unknown-gpu"
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    values = [ctypes.c_int(), ctypes.c_int()]
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), device_id)
        or driver.cuDeviceGetName(name, len(name), device)
        or any(
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            for value, attribute in zip(values, _COMPUTE_CAPABILITY, strict=True)
        )
    )
    if failed:
        return "unknown-gpu"
    words = re.sub("[^A-Za-z0-9]+", "-", name.value.decode(errors="replace")).strip("-")
    return f"{words}-sm{values[0].value}{values[1].value}"


def tensorrt_version() -> str:
    """The version of the TensorRT library, as its one number (101400 is 10.14.0); unknown where it does not load."""
    try:
        library = ctypes.CDLL("nvinfer_10.dll" if sys.platform == "win32" else "libnvinfer.so.10")
    except OSError:
        return "unknown"
    return str(library.getInferLibVersion())


def missing_libraries(library: Path) -> list[str]:
    """Names of the libraries that an ELF library asks for and that do not load; empty for files of Windows and macOS."""
    missing = []
    for name in _needed(library.read_bytes()):
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    return missing


def _needed(content: bytes) -> list[str]:
    """DT_NEEDED of a 64-bit little-endian ELF file (System V ABI, chapters 4 and 5)."""
    if content[:6] != b"\x7fELF\x02\x01":
        return []
    (start,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    segments = [struct.unpack_from("<IIQQQQ", content, start + index * size) for index in range(count)]
    entries: list[tuple[int, int]] = []
    for kind, _, offset, _, _, length in segments:
        if kind == 2:  # PT_DYNAMIC: pairs of tag and value
            entries += struct.iter_unpack("<qQ", content[offset : offset + length])
    table = next((value for tag, value in entries if tag == 5), 0)  # DT_STRTAB, an address
    for kind, _, offset, address, _, length in segments:
        if kind == 1 and address <= table < address + length:  # PT_LOAD: where addresses lie in the file
            strings = table - address + offset
            names = [strings + value for tag, value in entries if tag == 1]  # DT_NEEDED
            return [content[at : content.index(b"\0", at)].decode() for at in names]
    return []


def _remedy(missing: list[str]) -> str:
    """What brings the libraries; all of it where their names are not known."""
    tensorrt = any(name.startswith(("libnvinfer", "libnvonnxparser")) for name in missing)
    driver = any(name.startswith("libcuda.so") for name in missing)
    rest = [name for name in missing if not name.startswith(("libnvinfer", "libnvonnxparser", "libcuda.so"))]
    parts = []
    if driver or not missing:
        parts.append("the NVIDIA driver")
    if rest or not missing:
        parts.append("CUDA and cuDNN (pip install 'onnxruntime-gpu[cuda,cudnn]')")
    if tensorrt:
        parts.append("TensorRT 10 from NVIDIA, with its lib folder in LD_LIBRARY_PATH")
    return "Install " + " and ".join(parts)


def load_driver() -> ctypes.CDLL:
    """NVIDIA's, as a library. Raises OSError where there is none."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _preload() -> None:
    """Let ONNX Runtime find CUDA's libraries in the nvidia wheels. It prints what it does not find: errors come later."""
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
