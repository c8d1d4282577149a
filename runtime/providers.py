"""Execution providers as typed options, and the check that one really loads.

ONNX Runtime lists CUDA and TensorRT on machines that have neither, and turns a failed provider into a CPU session
without an exception. So a provider's library is loaded here first: its error names what is missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from onnxpress.errors import InputError, MissingExtraError, ProviderError
from onnxpress.manifest import Signature
from onnxpress.runtime.nvidia import (
    check_card,
    check_loads,
    file_name,
    gpu_name,
    tensorrt_version,
)

_WHEELS = ("onnxruntime", "onnxruntime-gpu")
_RTX_PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx"
_RTX_MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
_PRECISION = re.compile(r"trt_(fp16|bf16|int8|fp8|int4|fp4)_")  # flags that TensorRT 11 no longer has
_TYPICAL_SIZE = 128  # the size of a dynamic axis that TensorRT optimizes for, where the range allows it


@dataclass(frozen=True, kw_only=True)
class CPU:
    """The CPU provider. threads: None takes the cores that this process may use."""

    name: ClassVar[str] = "cpu"
    registered_as: ClassVar[str] = "CPUExecutionProvider"
    library: ClassVar[str | None] = None

    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise ProviderError(
                f"CPU(threads={self.threads!r}): a whole number from 1 on is needed; None takes all cores."
            )

    def options(self, signature: Signature | None, cache_key: str) -> dict[str, str]:
        """Options as ONNX Runtime takes them."""
        return {}


@dataclass(frozen=True, kw_only=True)
class CUDA:
    """The CUDA provider.

    memory_limit: bytes of the card's memory for weights and intermediate values; a language model's cache (`cache_bytes`) and the
    buffers of captured shapes come on top. tf32: faster float32 MatMuls with 10 bits of mantissa. graphs: whether launches for
    shapes that come again are captured and replayed, from buffers that stay where they are; None where the graph allows it, True
    says where it does not.
    """

    name: ClassVar[str] = "cuda"
    registered_as: ClassVar[str] = "CUDAExecutionProvider"
    library: ClassVar[str | None] = "providers_cuda"

    device_id: int = 0
    memory_limit: int | None = None
    tf32: bool = False
    graphs: bool | None = None

    def __post_init__(self) -> None:
        _check_device_id(self)
        if self.memory_limit is not None:
            _check_number(self, "memory_limit", 1, None, "bytes; None takes what is free")
        if not isinstance(self.tf32, bool):
            raise ProviderError(f"CUDA(tf32={self.tf32!r}): True or False is needed.")
        if not isinstance(self.graphs, bool | None):
            raise ProviderError(f"CUDA(graphs={self.graphs!r}): True, False or None is needed.")

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
    """The TensorRT provider. Precision is the graph's own: `onnxpress build --precision`.

    cache_folder: where engines and timings are kept, in a folder for each model, ONNX Runtime, TensorRT and card; another card or
    version builds anew, in a folder of its own. builder_optimization_level: 0 (builds fast) to 5 (runs fast).
    axes: {axis: (smallest, typical, largest)}, within the signature's ranges; axes that are not named keep those.
    ep_context: a file that receives the model with its engine inside; opened as a model, on the same kind of card and version, it
    builds nothing. raw_options: options of ONNX Runtime's provider, for what has no field here.

    Options are tested as ONNX Runtime is given them; engines, caches and context models were not tried, for want of TensorRT.
    """

    name: ClassVar[str] = "tensorrt"
    registered_as: ClassVar[str] = "TensorrtExecutionProvider"
    library: ClassVar[str | None] = "providers_tensorrt"

    device_id: int = 0
    cache_folder: Path | None = None
    builder_optimization_level: int = 3
    axes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict, hash=False)
    ep_context: Path | None = None
    raw_options: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _check_device_id(self)
        _check_number(self, "builder_optimization_level", 0, 5, "0 builds fast, 5 runs fast")
        for name in ("cache_folder", "ep_context"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, str | Path) or not str(value):
                    raise ProviderError(f"TensorRT({name}={value!r}): a path is needed.")
                object.__setattr__(self, name, Path(value))
        if self.ep_context is not None and self.ep_context.is_dir():
            raise ProviderError(f"TensorRT(ep_context={str(self.ep_context)!r}) is a folder; a file's path is needed.")
        if self.cache_folder is not None and self.ep_context is not None:
            raise ProviderError(
                "TensorRT was given cache_folder and ep_context; the context model holds the engine itself: give one of them."
            )
        if not isinstance(self.axes, Mapping):
            raise ProviderError(
                f"TensorRT(axes={self.axes!r}): a dict {{axis: (smallest, typical, largest)}} is needed."
            )
        for axis, sizes in self.axes.items():
            if not isinstance(axis, str):
                raise ProviderError(f"TensorRT(axes=…) has {axis!r}; the names of axes are needed.")
            whole = isinstance(sizes, tuple | list) and len(sizes) == 3 and all(type(size) is int for size in sizes)
            if not whole or not 0 < sizes[0] <= sizes[1] <= sizes[2]:
                raise ProviderError(
                    f"TensorRT(axes={{{axis!r}: {sizes!r}}}): three whole numbers are needed, (smallest, typical, largest), "
                    "from 1 and none below the one before."
                )
        if not isinstance(self.raw_options, Mapping) or not all(
            isinstance(part, str) for pair in self.raw_options.items() for part in pair
        ):
            raise ProviderError(f"TensorRT(raw_options={self.raw_options!r}): a dict of strings by name is needed.")
        precision = [name for name in self.raw_options if _PRECISION.match(name)]
        if precision:
            raise ProviderError(
                f"TensorRT(raw_options=…) has {', '.join(precision)}; precision is in the graph, and TensorRT 11 no longer has "
                "these flags: onnxpress build --target tensorrt --precision fp16, int8-qdq or fp8-qdq."
            )

    def options(self, signature: Signature | None, cache_key: str) -> dict[str, str]:
        """Options as ONNX Runtime takes them: shape profiles from the signature, caches keyed by model and versions."""
        options = {
            "device_id": str(self.device_id),
            "trt_builder_optimization_level": str(self.builder_optimization_level),
            "trt_sparsity_enable": "1",  # only weights that are 2:4 sparse are affected
        }
        sizes = self._sizes(signature)
        if signature is not None and sizes:
            for index, kind in enumerate(("min", "opt", "max")):
                options[f"trt_profile_{kind}_shapes"] = _profile(signature, sizes, index)
        if self.cache_folder is not None:
            here = f"onnxruntime-{_installed_version()}-tensorrt-{tensorrt_version()}-{gpu_name(self.device_id)}"
            folder = self.cache_folder / cache_key / here
            _make_folder(folder, "TensorRT's cache")  # TensorRT makes only the last folder of a path
            options |= {
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(folder),
                "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(folder),
            }
        if self.ep_context is not None:
            _make_folder(self.ep_context.parent, "The folder of TensorRT's context model")
            options |= {
                "trt_dump_ep_context_model": "1",
                "trt_ep_context_file_path": str(self.ep_context),
                "trt_ep_context_embed_mode": "1",  # one file, which can be moved
            }
        clash = sorted(options.keys() & self.raw_options.keys())
        if clash:
            raise ProviderError(
                f"TensorRT(raw_options=…) has {', '.join(clash)}, which TensorRT's own fields set: use those."
            )
        return options | dict(self.raw_options)

    @property
    def writes_engines(self) -> bool:
        """Whether engines or what they are made of go to disk."""
        raw = any(re.search("cache|dump|ep_context", name) for name in self.raw_options)
        return raw or self.cache_folder is not None or self.ep_context is not None

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raise InputError where an axis is outside of the profile that the engine was built for."""
        for axis, (low, _, high) in self.axes.items():
            if axis in sizes and not low <= sizes[axis] <= high:
                raise InputError(
                    f"{axis} {sizes[axis]} was given; TensorRT's profile of this session has {low} to {high}. Open one "
                    f"with other axes: TensorRT(axes={{{axis!r}: (smallest, typical, largest)}})."
                )

    def _sizes(self, signature: Signature | None) -> dict[str, tuple[int, int, int]]:
        """(smallest, typical, largest) of each dynamic axis; empty where there is none or a range is not known:
        TensorRT takes the profiles of all inputs or none. Raises ProviderError where `axes` does not fit."""
        if self.axes and signature is None:
            raise ProviderError(
                "TensorRT(axes=…) was given for a model whose signature is not known: load an artifact, or give "
                "Session(signature=…)."
            )
        dynamic: dict[str, None] = {}
        for spec in signature.inputs if signature is not None else ():
            dynamic |= dict.fromkeys(axis for axis in spec.shape if isinstance(axis, str))
        ranges = {axis: signature.axes[axis] for axis in dynamic if signature is not None and axis in signature.axes}
        unknown = [axis for axis in self.axes if axis not in dynamic]
        if unknown:
            raise ProviderError(
                f"TensorRT(axes=…) names {', '.join(unknown)}; the model's dynamic axes are: {', '.join(dynamic) or 'none'}."
            )
        for axis, (low, _, high) in self.axes.items():
            first, last = ranges.setdefault(axis, (low, high))
            if not first <= low <= high <= last:
                raise ProviderError(f"TensorRT(axes=…) has {axis} {low} to {high}; the model takes {first} to {last}.")
        if len(ranges) < len(dynamic):
            if self.axes:
                missing = ", ".join(axis for axis in dynamic if axis not in ranges)
                raise ProviderError(
                    f"TensorRT(axes=…) has to name {missing} as well: the model gives no range for them."
                )
            return {}
        typical = {axis: (low, min(max(low, _TYPICAL_SIZE), high), high) for axis, (low, high) in ranges.items()}
        return typical | {axis: (low, middle, high) for axis, (low, middle, high) in self.axes.items()}


@dataclass(frozen=True, kw_only=True)
class NvTensorRtRtx:
    """TensorRT for RTX, ONNX Runtime's plugin provider from the package onnxruntime-ep-nv-tensorrt-rtx.

    Not tried on a card: registration, devices and sessions follow ONNX Runtime's interface for plugin providers.
    """

    name: ClassVar[str] = "tensorrt-rtx"
    registered_as: ClassVar[str] = "NvTensorRTRTXExecutionProvider"
    library: ClassVar[str | None] = None

    device_id: int = 0

    def __post_init__(self) -> None:
        _check_device_id(self)

    def options(self, signature: Signature | None, cache_key: str) -> dict[str, str]:
        """Options as ONNX Runtime takes them; shapes are dynamic without profiles."""
        return {}

    def devices(self) -> list[Any]:
        """The card as ONNX Runtime's sessions take it from a plugin provider. Raises ProviderError."""
        import onnxruntime

        def found() -> list[Any]:
            return [device for device in onnxruntime.get_ep_devices() if device.ep_name == self.registered_as]

        if not found():
            try:
                library = importlib.import_module(_RTX_MODULE).get_library_path()
                onnxruntime.register_execution_provider_library(self.registered_as, library)
            except Exception as error:  # ONNX Runtime's errors have no common base but Exception
                raise ProviderError(
                    f"The provider tensorrt-rtx was asked for and does not load: {' '.join(str(error).split())[:300]}. "
                    f"pip install --force-reinstall {_RTX_PACKAGE}, or ask for cuda or cpu."
                ) from error
        cards = found()
        if self.device_id >= len(cards):
            raise ProviderError(
                f"The provider tensorrt-rtx was asked for with device_id {self.device_id}; it takes {len(cards)} of this "
                "machine's cards. Ask for another, or for cuda or cpu."
            )
        return [cards[self.device_id]]


Provider = CPU | CUDA | TensorRT | NvTensorRtRtx
PROVIDERS: Mapping[str, type[CPU | CUDA | TensorRT | NvTensorRtRtx]] = {
    kind.name: kind for kind in (CPU, CUDA, TensorRT, NvTensorRtRtx)
}


def make_providers(given: str | Provider | Sequence[str | Provider]) -> tuple[Provider, ...]:
    """Providers from names or options, in the given order. Raises ProviderError for an unknown or repeated one."""
    if isinstance(given, str | Provider):
        given = (given,)
    made: list[Provider] = []
    for item in given:
        if isinstance(item, str):
            if item not in PROVIDERS:
                raise ProviderError(f"Unknown provider {item!r}; the providers are: {', '.join(PROVIDERS)}.")
            made.append(PROVIDERS[item]())
        elif isinstance(item, Provider):
            made.append(item)
        else:
            raise ProviderError(
                f"{item!r} was given as a provider; give a name ({', '.join(PROVIDERS)}) or options (CUDA())."
            )
    names = [provider.name for provider in made]
    if not names or len(set(names)) != len(names):
        raise ProviderError(f"Providers {names} were asked for; give at least one, and each once.")
    if "tensorrt-rtx" in names and {"cuda", "tensorrt"} & set(names):
        raise ProviderError(
            f"Providers {names} were asked for; ONNX Runtime takes the plugin tensorrt-rtx alone or with cpu behind it."
        )
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


def check_provider(provider: str | Provider) -> None:
    """Load a provider's library and look for its card, or raise ProviderError naming what is missing."""
    wheel = check_wheel()
    [provider] = make_providers((provider,))
    if isinstance(provider, CPU):
        return
    if isinstance(provider, NvTensorRtRtx):
        _check_rtx_package()
        check_card(provider.name, provider.device_id)
        provider.devices()
        return
    import onnxruntime

    library = Path(onnxruntime.__file__).parent / "capi" / file_name(provider.library or "")
    if not library.is_file():
        raise ProviderError(
            f"The provider {provider.name} was asked for and is not in the installed wheel ({wheel}). It comes with "
            f"pip uninstall -y {wheel}, then pip install 'onnxpress[gpu]'; or ask for the provider cpu."
        )
    if isinstance(provider, TensorRT) and provider.raw_options:
        known = {name.decode() for name in re.findall(rb"trt_[a-z0-9_]+(?=\0)", library.read_bytes())}
        unknown = [name for name in provider.raw_options if name not in known]
        if unknown and known:
            raise ProviderError(
                f"TensorRT(raw_options=…) has {', '.join(unknown)}, which this ONNX Runtime does not know; it knows "
                f"{', '.join(sorted(name for name in known if not _PRECISION.match(name)))}."
            )
    check_loads(provider.name, library)
    check_card(provider.name, provider.device_id)


def refusal(error: Exception, providers: Sequence[Provider]) -> ProviderError | None:
    """What ONNX Runtime's error says about a card's memory, libraries or engines; None where it is about something else."""
    text = " ".join(str(error).split())
    names = ", ".join(provider.name for provider in providers)
    if all(isinstance(provider, CPU) for provider in providers):
        return None
    if re.search(r"bfc_arena|Available memory|Failed to allocate|out of memory|ALLOC_FAILED", text, re.IGNORECASE):
        limits = [one.memory_limit for one in providers if isinstance(one, CUDA) and one.memory_limit is not None]
        asked = re.search(r"(?:requested bytes of|requested buffer of size) (\d+)", text)
        free = re.search(r"Available memory of (\d+)", text)
        return ProviderError(
            f"The memory of the card does not suffice ({names}): "
            + (f"{asked[1]} bytes more were asked for" if asked else "more was asked for")
            + (f", {free[1]} were left" if free else "")
            + (f" of CUDA(memory_limit={limits[0]})" if limits else "")
            + (". Give a larger memory_limit" if limits else ". Free memory on the card (nvidia-smi)")
            + f", or smaller inputs. ONNX Runtime: {text[:300]}"
        )
    if found := re.search(r"(?:CUDA|CUBLAS|CUDNN)\w* (?:failure|error) ?\d*[^;]*", text, re.IGNORECASE):
        return ProviderError(
            f"The card failed ({names}): {found[0][:200]}. Where it was an assertion or a wrong access, the process cannot go on with the card: start it anew. ONNX Runtime: "
            f"{text[:300]}"
        )
    if re.search(r"cuDNN is (not available|unavailable)", text):
        return ProviderError(
            "The model needs cuDNN, which is not installed: pip install 'onnxruntime-gpu[cudnn]', or ask for the provider cpu. "
            f"ONNX Runtime: {text[:300]}"
        )
    if "deserialize engine" in text:
        return ProviderError(
            "The engine in this model or cache does not load; one built on another kind of card or by another TensorRT does not. "
            f"Build it anew here: open the model itself, with TensorRT(ep_context=…). ONNX Runtime: {text[:300]}"
        )
    return None


def _check_rtx_package() -> None:
    for name in (_RTX_PACKAGE, f"{_RTX_PACKAGE}-cu13", f"{_RTX_PACKAGE}-cu12"):
        if _version(name) is not None:
            return
    raise ProviderError(
        f"The provider tensorrt-rtx was asked for and its package is not installed: pip install {_RTX_PACKAGE} "
        "(NVIDIA RTX cards), or ask for cuda or cpu."
    )


def _check_device_id(provider: Any) -> None:
    _check_number(
        provider, "device_id", 0, None, "as CUDA counts the cards: within CUDA_VISIBLE_DEVICES, the fastest first"
    )


def _check_number(provider: Any, name: str, low: int, high: int | None, hint: str) -> None:
    value = getattr(provider, name)
    if type(value) is not int or value < low or (high is not None and value > high):
        allowed = f"{low} or more" if high is None else f"{low} to {high}"
        raise ProviderError(
            f"{type(provider).__name__}({name}={value!r}): a whole number is needed, {allowed} ({hint})."
        )


def _make_folder(folder: Path, what: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProviderError(f"{what} {folder} cannot be made: {error.strerror}. Give another.") from None


def _profile(signature: Signature, sizes: Mapping[str, tuple[int, int, int]], index: int) -> str:
    return ",".join(
        f"{spec.name}:{'x'.join(str(sizes[axis][index] if isinstance(axis, str) else axis) for axis in spec.shape)}"
        for spec in signature.inputs
    )


def _installed_version() -> str:
    return next((version for name in _WHEELS if (version := _version(name)) is not None), "unknown")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
