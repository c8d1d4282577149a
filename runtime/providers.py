"""Execution providers as typed options, and the check that one really loads.

ONNX Runtime lists CUDA and TensorRT on machines that have neither, and turns a failed provider into a CPU session
without an exception. So a provider's library is loaded here first: its error names what is missing.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from onnxpress.errors import MissingExtraError, ProviderError
from onnxpress.manifest import Signature

_WHEELS = ("onnxruntime", "onnxruntime-gpu")
_TYPICAL_SIZE = 128  # the size of a dynamic axis that TensorRT optimizes for, where the range allows it


@dataclass(frozen=True, kw_only=True)
class CPU:
    """The CPU provider. threads: None takes the cores that this process may use."""

    name: ClassVar[str] = "cpu"
    registered_as: ClassVar[str] = "CPUExecutionProvider"
    library: ClassVar[str | None] = None

    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ProviderError(f"CPU(threads={self.threads}): at least one thread is needed; None takes all cores.")

    def options(self, signature: Signature | None, cache_key: str) -> dict[str, str]:
        """Options as ONNX Runtime takes them."""
        return {}


@dataclass(frozen=True, kw_only=True)
class CUDA:
    """The CUDA provider. memory_limit: bytes. tf32: faster float32 MatMuls with 10 bits of mantissa.

    graphs: whether launches for shapes that come again are captured and replayed; None where the graph allows it, True says where it
    does not.
    """

    name: ClassVar[str] = "cuda"
    registered_as: ClassVar[str] = "CUDAExecutionProvider"
    library: ClassVar[str | None] = "providers_cuda"

    device_id: int = 0
    memory_limit: int | None = None
    tf32: bool = False
    graphs: bool | None = None

    def options(self, signature: Signature | None, cache_key: str) -> dict[str, str]:
        """Options as ONNX Runtime takes them; convolution algorithms by heuristic, since shapes are dynamic."""
        options = {
            "device_id": str(self.device_id),
            "use_tf32": str(int(self.tf32)),
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        if self.memory_limit is not None:
            options["gpu_mem_limit"] = str(self.memory_limit)
        if self.graphs is not False:
            options["enable_cuda_graph"] = "1"
        return options


@dataclass(frozen=True, kw_only=True)
class TensorRT:
    """The TensorRT provider. Precision is the graph's own. cache_folder: where engines and timings are kept."""

    name: ClassVar[str] = "tensorrt"
    registered_as: ClassVar[str] = "TensorrtExecutionProvider"
    library: ClassVar[str | None] = "providers_tensorrt"

    device_id: int = 0
    cache_folder: Path | None = None
    builder_optimization_level: int = 3

    def options(self, signature: Signature | None, cache_key: str) -> dict[str, str]:
        """Options as ONNX Runtime takes them: shape profiles from the signature, caches keyed by model and versions."""
        options = {
            "device_id": str(self.device_id),
            "trt_builder_optimization_level": str(self.builder_optimization_level),
            "trt_sparsity_enable": "1",  # only weights that are 2:4 sparse are affected
        }
        if signature is not None and _has_ranges(signature):
            for kind in ("min", "opt", "max"):
                options[f"trt_profile_{kind}_shapes"] = _profile(signature, kind)
        if self.cache_folder is not None:
            # ONNX Runtime puts TensorRT's and CUDA's versions and the card's compute capability into the files' names.
            folder = self.cache_folder / cache_key / f"onnxruntime-{_installed_version()}"
            _make_folder(folder)  # TensorRT makes only the last folder of a path
            options |= {
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(folder),
                "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(folder),
            }
        return options


Provider = CPU | CUDA | TensorRT
PROVIDERS: Mapping[str, type[CPU | CUDA | TensorRT]] = {"cpu": CPU, "cuda": CUDA, "tensorrt": TensorRT}


def make_providers(given: Sequence[str | Provider]) -> tuple[Provider, ...]:
    """Providers from names or options, in the given order. Raises ProviderError for an unknown or repeated one."""
    if isinstance(given, str):
        given = (given,)
    made: list[Provider] = []
    for item in given:
        if isinstance(item, str):
            if item not in PROVIDERS:
                raise ProviderError(f"Unknown provider {item!r}; the providers are: {', '.join(PROVIDERS)}.")
            made.append(PROVIDERS[item]())
        else:
            made.append(item)
    names = [provider.name for provider in made]
    if not names or len(set(names)) != len(names):
        raise ProviderError(f"Providers {names} were asked for; give at least one, and each once.")
    return tuple(made)


def check_wheel() -> str:
    """Name of the one onnxruntime wheel that is installed. Raises MissingExtraError, ProviderError."""
    installed = [name for name in _WHEELS if _version(name) is not None]
    if len(installed) > 1:
        raise ProviderError(
            "Both onnxruntime and onnxruntime-gpu are installed and overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them, e.g. pip install 'onnxpress[cpu]'."
        )
    if not installed and importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtraError(
            "ONNX Runtime is not installed: pip install 'onnxpress[cpu]', or 'onnxpress[gpu]' for NVIDIA cards."
        )
    try:
        from onnxruntime import InferenceSession  # noqa: F401  an empty folder can still be imported
    except ImportError as error:
        raise ProviderError(
            f"ONNX Runtime is installed and does not load ({error}), as when one of its two wheels was uninstalled beside "
            "the other: pip uninstall -y onnxruntime onnxruntime-gpu, then install one, e.g. pip install 'onnxpress[cpu]'."
        ) from None
    return installed[0] if installed else "onnxruntime"


def check_provider(name: str) -> None:
    """Load a provider's library, or raise ProviderError naming what is missing."""
    wheel = check_wheel()
    kind = PROVIDERS[name]
    if kind.library is None:
        return
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent / "capi"
    library = folder / _file_name(kind.library)
    if not library.is_file():
        raise ProviderError(
            f"The provider {name} was asked for and is not in the installed wheel ({wheel}). It comes with "
            f"pip uninstall -y {wheel}, then pip install 'onnxpress[gpu]'."
        )
    if name in ("cuda", "tensorrt") and hasattr(onnxruntime, "preload_dlls"):
        _preload()
    try:
        ctypes.CDLL(str(folder / _file_name("providers_shared")), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        raise ProviderError(
            f"The provider {name} was asked for and does not load: {error}. Install the NVIDIA driver and the libraries "
            f"that the wheel was built for (pip install 'onnxruntime-gpu[cuda,cudnn]' brings CUDA's"
            f"{'; TensorRT comes from NVIDIA' if name == 'tensorrt' else ''}), or ask for the provider cpu."
        ) from None
    if name in ("cuda", "tensorrt"):
        _check_driver(name)


def _check_driver(name: str) -> None:
    """The libraries can be there without a card: ask the driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
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


def _preload() -> None:
    """Let ONNX Runtime find CUDA's libraries in the nvidia wheels. It prints what it does not find: errors come later."""
    import contextlib
    import io

    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProviderError(f"TensorRT's cache {folder} cannot be made: {error.strerror}. Give another.") from None


def _has_ranges(signature: Signature) -> bool:
    """Whether some axis is dynamic, and the range of each is known: TensorRT takes all profiles or none."""
    axes = {axis for spec in signature.inputs for axis in spec.shape if isinstance(axis, str)}
    return bool(axes) and axes <= set(signature.axes)


def _profile(signature: Signature, kind: str) -> str:
    parts = []
    for spec in signature.inputs:
        sizes = []
        for axis in spec.shape:
            low, high = signature.axes[axis] if isinstance(axis, str) else (axis, axis)
            sizes.append({"min": low, "max": high, "opt": min(max(low, _TYPICAL_SIZE), high)}[kind])
        parts.append(f"{spec.name}:{'x'.join(map(str, sizes))}")
    return ",".join(parts)


def _file_name(library: str) -> str:
    if sys.platform == "win32":
        return f"onnxruntime_{library}.dll"
    return f"libonnxruntime_{library}.{'dylib' if sys.platform == 'darwin' else 'so'}"


def _installed_version() -> str:
    return next((version for name in _WHEELS if (version := _version(name)) is not None), "unknown")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
