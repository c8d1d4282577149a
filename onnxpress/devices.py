"""The devices that bundles are made for: which builds suit them, and how they run.

A build's target decides the form of its integers (signed on ARM, 7 bits on x86 without VNNI, symmetric for NVIDIA); what holds no
quantized activations suits every CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from onnxpress.errors import RecipeError

if TYPE_CHECKING:
    from onnxpress.manifest import Manifest

_ANY_CPU = ("fp32", "int8-weights", "int4-weights")  # precisions that no CPU has kernels of its own for
_X86, _ARM, _NVIDIA = ("cpu", "cpu-avx2", "openvino"), ("cpu-arm64",), ("tensorrt", "cuda")
_WITHOUT_FP8 = ("jetson-orin",)  # Ampere
_TAKEN = ("kept", "repaired")
_COMPILED = (*_NVIDIA, "openvino")  # for a provider beside the CPU's


@dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of device.

    system, machine: what Python's platform module says there, in small letters. builds: the build targets that suit it, the usual one
    first. threads: None takes all cores. model: the file that ONNX Runtime opens; model.ort, in its own format, where it is usually a
    reduced build, which reads no other. python: whether a bundle brings run.py.
    """

    system: str
    machine: str
    builds: tuple[str, ...]
    threads: int | None = None
    archive: Literal["tar", "zip"] = "tar"
    model: Literal["model.onnx", "model.ort"] = "model.onnx"
    python: bool = True


DEVICES: Mapping[str, Device] = {
    "linux-x86_64": Device(system="linux", machine="x86_64", builds=_X86),
    "linux-aarch64": Device(system="linux", machine="aarch64", builds=_ARM),
    "raspberry-pi-5": Device(system="linux", machine="aarch64", builds=_ARM, threads=4),
    "jetson-orin": Device(system="linux", machine="aarch64", builds=_NVIDIA),
    "jetson-thor": Device(system="linux", machine="aarch64", builds=_NVIDIA),
    "windows-x86_64": Device(system="windows", machine="x86_64", builds=_X86, archive="zip"),
    "macos-arm64": Device(system="darwin", machine="aarch64", builds=_ARM),
    "android-arm64": Device(
        system="android", machine="aarch64", builds=_ARM, archive="zip", model="model.ort", python=False
    ),
    # WebAssembly's integer kernels are exact. Signed weights of 7 bits are the fastest there.
    "browser": Device(
        system="browser", machine="wasm", builds=("cpu-avx2", "cpu", "cpu-arm64"), archive="zip", python=False
    ),
}


def device(name: str) -> Device:
    """Look a device up. Raises RecipeError that lists them."""
    if name not in DEVICES:
        raise RecipeError(f"Unknown device {name!r}; bundles are made for: {', '.join(DEVICES)}.")
    return DEVICES[name]


def providers(manifest: Manifest) -> tuple[str, ...]:
    """Execution providers of an artifact on its device, in order, as `load` takes them."""
    return (manifest.target, "cpu") if manifest.target in _COMPILED else ("cpu",)


def check_fit(name: str, manifest: Manifest) -> None:
    """Raise RecipeError where an artifact's quantization is not the device's, with the build that is."""
    builds = device(name).builds
    any_cpu = manifest.precision in _ANY_CPU and manifest.target not in _COMPILED and not set(builds) & set(_NVIDIA)
    # `only`: several passes, of which precision is the last.
    any_cpu = any_cpu and not manifest.recipe.get("build", {}).get("only")
    if name in _WITHOUT_FP8 and any(row["pass"] == "fp8-qdq" and row["status"] in _TAKEN for row in manifest.ledger):
        raise RecipeError(
            f"{manifest.name} is in FP8, which {name} has no kernels for (Ada, Hopper and newer have): build it again with "
            "--precision int8-qdq or fp16."
        )
    if manifest.target not in builds and not any_cpu:
        raise RecipeError(
            f"{manifest.name} was built for {manifest.target} at {manifest.precision}, which does not suit {name}: build it again "
            f"with --target {builds[0]}."
        )
