"""Which providers load on this machine, for tests that need one."""

from __future__ import annotations

from onnxpress.errors import ProviderError
from onnxpress.runtime.providers import check_provider


def loads(name: str) -> bool:
    try:
        check_provider(name)
    except ProviderError:
        return False
    return True
