"""The provider OpenVINO as typed options: Intel's compiler for its processors, as a plugin of ONNX Runtime."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from onnxpress.errors import InputError, ProviderError
from onnxpress.manifest import Arrays, Signature
from onnxpress.runtime.plugin import plugin_devices
from onnxpress.runtime.threads import check_threads
from onnxpress.runtime.wheel import version_of

_PACKAGE = "onnxruntime-ep-openvino"
_HALF = {"CPU": "bf16", "GPU": "f16"}
_INTEGERS = np.iinfo(np.int32)  # what OpenVINO's kernels compute with, whatever the graph says
_INTEL = 0x8086  # its number as a maker of devices
_loaded_in: list[int] = []  # the process whose threads the library has


@dataclass(frozen=True, kw_only=True)
class OpenVINO:
    """OpenVINO, from the package onnxruntime-ep-openvino (Linux and Windows on x86-64).

    device: CPU, GPU or NPU, as OpenVINO names what it finds; only CPU was tried. threads: of the CPU; None takes the cores that this
    process may use. In which precision floats are computed is said by the artifact: `onnxpress build --precision`.
    """

    name: ClassVar[str] = "openvino"
    registered_as: ClassVar[str] = "OpenVINOExecutionProvider"

    device: str = "CPU"
    threads: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not self.device:
            raise ProviderError(f"OpenVINO(device={self.device!r}): a name is needed: CPU, GPU or NPU.")
        check_threads(self)

    def options(self, signature: Signature | None, cache_key: str) -> dict[str, str]:
        """None: a plugin is told of them with its device."""
        return {}

    def plugin_options(self, threads: int, *, half_floats: bool, streams: int = 1) -> dict[str, str]:
        """Options as ONNX Runtime takes them with `devices`. half_floats: Session. streams: runs at once, which share the threads.

        OpenVINO's own default is half precision wherever the processor has it, also for graphs of float32.
        """
        options = {}
        if self.device in _HALF:
            half = half_floats and (self.device != "CPU" or _cpu_has_bfloat16())
            options["INFERENCE_PRECISION_HINT"] = _HALF[self.device] if half else "f32"
        if self.device == "CPU":
            options |= {"NUM_STREAMS": str(streams), "INFERENCE_NUM_THREADS": str(threads)}
        return {"load_config": json.dumps({self.device: options})} if options else {}

    def check(self) -> None:
        """Look for the provider's package and the device. Raises ProviderError naming what is missing."""
        if version_of(_PACKAGE) is None:
            raise ProviderError(
                f"The provider openvino was asked for and its package is not installed: pip install {_PACKAGE} "
                "(Linux and Windows on x86-64), or ask for the provider cpu."
            )
        self.devices()

    def check_inputs(self, feeds: Arrays) -> None:
        """Raise InputError for integers that OpenVINO would wrap at 32 bits, ProviderError in a process that was forked behind it."""
        _check_process()
        for name, array in feeds.items():
            wide = array.dtype.kind in "iu" and array.dtype.itemsize >= 4 and array.dtype != np.int32 and array.size
            if wide and not _INTEGERS.min <= array.min() <= array.max() <= _INTEGERS.max:
                raise InputError(
                    f"The input {name} has {array.min()} to {array.max()}; OpenVINO computes with integers of 32 bits. "
                    "Ask for the provider cpu, with a build for it."
                )

    def devices(self) -> list[Any]:
        """The device as ONNX Runtime's sessions take it from a plugin provider. Raises ProviderError."""
        _check_process()
        found = plugin_devices(self.name, self.registered_as, _PACKAGE)
        _loaded_in[:] = [os.getpid()]
        names = [str(one.ep_metadata.get("ov_device", "")) for one in found]
        if not names and (maker := _other_maker()):
            raise ProviderError(
                f"The provider openvino was asked for; the package {_PACKAGE} offers itself on Intel's processors alone, this one is by "
                f"{maker}. Ask for the provider cpu, with a build for it."
            )
        if self.device not in names:
            raise ProviderError(
                f"The provider openvino was asked for with the device {self.device}; it finds {', '.join(names) or 'none'} here. "
                "Ask for another, or for the provider cpu."
            )
        return [found[names.index(self.device)]]


def _check_process() -> None:
    """Raise ProviderError where the library's threads are another process's: it would wait for them for ever."""
    if _loaded_in and _loaded_in != [os.getpid()]:
        raise ProviderError(
            "This process was forked from one that had OpenVINO open, whose threads do not survive that: start processes with "
            "multiprocessing's spawn, or fork before anything is opened on openvino."
        )


def _other_maker() -> str:
    """Who made the processor, as ONNX Runtime says; empty where it is Intel."""
    import onnxruntime

    kinds = onnxruntime.OrtHardwareDeviceType
    found = (one.device for one in onnxruntime.get_ep_devices() if one.device.type == kinds.CPU)
    return next((str(one.vendor) or "another maker" for one in found if one.vendor_id != _INTEL), "")


@cache
def _cpu_has_bfloat16() -> bool:
    """Where the system does not say, OpenVINO decides."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) is not None
