"""The execution providers there are, the check that one really loads, and what ONNX Runtime's errors say of a card.

ONNX Runtime lists CUDA and TensorRT on machines that have neither, and turns a failed provider into a CPU session
without an exception. So a provider's library is loaded here first: its error names what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from onnxpress.errors import ProviderError
from onnxpress.manifest import Signature
from onnxpress.runtime.cuda import CUDA
from onnxpress.runtime.openvino import OpenVINO
from onnxpress.runtime.tensorrt import NvTensorRtRtx, TensorRT
from onnxpress.runtime.threads import check_threads
from onnxpress.runtime.wheel import check_wheel


@dataclass(frozen=True, kw_only=True)
class CPU:
    """The CPU provider. threads: None takes the cores that this process may use."""

    name: ClassVar[str] = "cpu"
    registered_as: ClassVar[str] = "CPUExecutionProvider"

    threads: int | None = None

    def __post_init__(self) -> None:
        check_threads(self)

    def options(self, signature: Signature | None, cache_key: str) -> dict[str, str]:
        """Options as ONNX Runtime takes them."""
        return {}

    def check(self) -> None:
        """Nothing that could be missing."""


Provider = CPU | CUDA | TensorRT | NvTensorRtRtx | OpenVINO
PROVIDERS: Mapping[str, type[Provider]] = {kind.name: kind for kind in (CPU, CUDA, TensorRT, NvTensorRtRtx, OpenVINO)}
PLUGINS = (NvTensorRtRtx, OpenVINO)  # given to a session as a device; CPU comes behind by itself


def make_providers(given: str | Provider | Sequence[str | Provider]) -> tuple[Provider, ...]:
    """Providers from names or options, in the given order. Raises ProviderError for an unknown or repeated one."""
    if isinstance(given, str | Provider):
        given = (given,)
    if not isinstance(given, Sequence):
        raise ProviderError(
            f"{given!r} was given as providers; give a name ({', '.join(PROVIDERS)}), options (CUDA()), or a list of them."
        )
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
    plugins = [provider.name for provider in made if isinstance(provider, PLUGINS)]
    if plugins and names not in (plugins[:1], [plugins[0], CPU.name]):
        raise ProviderError(
            f"Providers {names} were asked for; ONNX Runtime takes the plugin {plugins[0]} alone or with cpu behind it."
        )
    return tuple(made)


def check_provider(provider: str | Provider) -> None:
    """Load a provider's library and look for its card, or raise ProviderError naming what is missing."""
    check_wheel()
    [provider] = make_providers((provider,))
    provider.check()


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


def one_line(error: Exception) -> str:
    """What an error of ONNX Runtime says, on one line of bounded length."""
    return " ".join(str(error).split())[:500]
