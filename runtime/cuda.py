"""The CUDA provider as typed options, and the checks of options that NVIDIA's providers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from onnxpress.errors import ProviderError
from onnxpress.manifest import Signature
from onnxpress.runtime.nvidia import check_card, check_loads
from onnxpress.runtime.wheel import provider_library

CAPTURES = "enable_cuda_graph"  # the option's name


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

    device_id: int = 0
    memory_limit: int | None = None
    tf32: bool = False
    graphs: bool | None = None

    def __post_init__(self) -> None:
        check_device_id(self)
        if self.memory_limit is not None:
            check_number(self, "memory_limit", 1, None, "bytes; None takes what is free")
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
            options[CAPTURES] = "1"
        return options

    def check(self) -> None:
        """Load the provider's library and look for its card. Raises ProviderError naming what is missing."""
        check_loads(self.name, provider_library(self.name, "providers_cuda"))
        check_card(self.name, self.device_id)


def check_device_id(provider: Any) -> None:
    """Raise ProviderError where it is no number of a card."""
    check_number(
        provider, "device_id", 0, None, "as CUDA counts the cards: within CUDA_VISIBLE_DEVICES, the fastest first"
    )


def check_number(provider: Any, name: str, low: int, high: int | None, hint: str) -> None:
    """Raise ProviderError where an option is no whole number of this range; hint: what it means."""
    value = getattr(provider, name)
    if type(value) is not int or value < low or (high is not None and value > high):
        allowed = f"{low} or more" if high is None else f"{low} to {high}"
        raise ProviderError(
            f"{type(provider).__name__}({name}={value!r}): a whole number is needed, {allowed} ({hint})."
        )
