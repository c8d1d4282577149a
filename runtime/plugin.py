"""Execution providers that ONNX Runtime loads from a package beside its own wheel."""

from __future__ import annotations

import importlib
from typing import Any

from onnxpress.errors import ProviderError

_registered: set[str] = set()  # a library without devices here shows none, and cannot be registered again


def plugin_devices(name: str, registered_as: str, package: str) -> list[Any]:
    """The devices of a plugin provider, as ONNX Runtime's sessions take them; its library is registered once.

    name: as users call the provider. package: on the package index. Raises ProviderError where it does not load.
    """
    import onnxruntime

    def found() -> list[Any]:
        return [device for device in onnxruntime.get_ep_devices() if device.ep_name == registered_as]

    if registered_as not in _registered and not found():
        try:
            library = importlib.import_module(package.replace("-", "_")).get_library_path()
            onnxruntime.register_execution_provider_library(registered_as, library)
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            raise ProviderError(
                f"The provider {name} was asked for and does not load: {' '.join(str(error).split())[:300]}. "
                f"pip install --force-reinstall {package}, or ask for another provider (cpu)."
            ) from error
        _registered.add(registered_as)
    return found()
