"""The providers TensorRT and TensorRT for RTX as typed options."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from onnxpress.errors import InputError, ProviderError
from onnxpress.manifest import Signature
from onnxpress.runtime.cuda import check_device_id, check_number
from onnxpress.runtime.nvidia import check_card, check_loads, gpu_name, tensorrt_version
from onnxpress.runtime.plugin import plugin_devices
from onnxpress.runtime.wheel import onnxruntime_version, provider_library, version_of

_RTX_PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx"
_PRECISION = re.compile(r"trt_(fp16|bf16|int8|fp8|int4|fp4)_")  # flags that TensorRT 11 no longer has
_TYPICAL_SIZE = 128  # the size of a dynamic axis that TensorRT optimizes for, where the range allows it


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

    device_id: int = 0
    cache_folder: Path | None = None
    builder_optimization_level: int = 3
    axes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict, hash=False)
    ep_context: Path | None = None
    raw_options: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_device_id(self)
        check_number(self, "builder_optimization_level", 0, 5, "0 builds fast, 5 runs fast")
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
            here = f"onnxruntime-{onnxruntime_version()}-tensorrt-{tensorrt_version()}-{gpu_name(self.device_id)}"
            here += f"-level-{self.builder_optimization_level}"
            if self.raw_options:
                here += f"-{hashlib.sha256(repr(sorted(self.raw_options.items())).encode()).hexdigest()[:12]}"
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

    def check(self) -> None:
        """Load the provider's library and look for its card. Raises ProviderError naming what is missing."""
        library = provider_library(self.name, "providers_tensorrt")
        if self.raw_options:
            self._check_raw_options(library)
        check_loads(self.name, library)
        check_card(self.name, self.device_id)

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

    def _check_raw_options(self, library: Path) -> None:
        known = {name.decode() for name in re.findall(rb"trt_[a-z0-9_]+(?=\0)", library.read_bytes())}
        unknown = [name for name in self.raw_options if name not in known]
        if unknown and known:
            raise ProviderError(
                f"TensorRT(raw_options=…) has {', '.join(unknown)}, which this ONNX Runtime does not know; it knows "
                f"{', '.join(sorted(name for name in known if not _PRECISION.match(name)))}."
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

    device_id: int = 0

    def __post_init__(self) -> None:
        check_device_id(self)

    def options(self, signature: Signature | None, cache_key: str) -> dict[str, str]:
        """Options as ONNX Runtime takes them; shapes are dynamic without profiles."""
        return {}

    def plugin_options(self, threads: int, *, half_floats: bool, streams: int = 1) -> dict[str, str]:
        """Options as ONNX Runtime takes them with `devices`: none."""
        return {}

    def check(self) -> None:
        """Look for the provider's package and its card. Raises ProviderError naming what is missing."""
        if all(version_of(f"{_RTX_PACKAGE}{cuda}") is None for cuda in ("", "-cu13", "-cu12")):
            raise ProviderError(
                f"The provider tensorrt-rtx was asked for and its package is not installed: pip install {_RTX_PACKAGE} "
                "(NVIDIA RTX cards), or ask for cuda or cpu."
            )
        check_card(self.name, self.device_id)
        self.devices()

    def devices(self) -> list[Any]:
        """The card as ONNX Runtime's sessions take it from a plugin provider. Raises ProviderError."""
        cards = plugin_devices(self.name, self.registered_as, _RTX_PACKAGE)
        if self.device_id >= len(cards):
            raise ProviderError(
                f"The provider tensorrt-rtx was asked for with device_id {self.device_id}; it takes {len(cards)} of this "
                "machine's cards. Ask for another, or for cuda or cpu."
            )
        return [cards[self.device_id]]


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
