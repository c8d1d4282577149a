"""The provider OpenVINO as typed options: Intel's compiler for its processors, as a plugin of ONNX Runtime."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from onnxpress.errors import ProviderError
from onnxpress.manifest import Signature
from onnxpress.runtime.plugin import plugin_devices
from onnxpress.runtime.wheel import version_of

_PACKAGE = "onnxruntime-ep-openvino"
_HALF = {"CPU": "bf16", "GPU": "f16"}


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
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise ProviderError(
                f"OpenVINO(threads={self.threads!r}): a whole number from 1 on is needed; None takes all cores."
            )

    def options(self, signature: Signature | None, cache_key: str) -> dict[str, str]:
        """None: a plugin is told of them with its device."""
        return {}

    def plugin_options(self, threads: int, *, half_floats: bool, streams: int = 1) -> dict[str, str]:
        """Options as ONNX Runtime takes them with `devices`. half_floats: Session. streams: runs at once, which share the threads.

        OpenVINO's own default is half precision wherever the processor has it, also for graphs of float32.
        """
        options = {}
        if self.device in _HALF:
            options["INFERENCE_PRECISION_HINT"] = _HALF[self.device] if half_floats else "f32"
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

    def devices(self) -> list[Any]:
        """The device as ONNX Runtime's sessions take it from a plugin provider. Raises ProviderError."""
        found = plugin_devices(self.name, self.registered_as, _PACKAGE)
        names = [str(one.ep_metadata.get("ov_device", "")) for one in found]
        if self.device not in names:
            raise ProviderError(
                f"The provider openvino was asked for with the device {self.device}; it finds {', '.join(names) or 'none'} here. "
                "Ask for another, or for the provider cpu."
            )
        return [found[names.index(self.device)]]
