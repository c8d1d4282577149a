"""Which providers load on this machine, for tests that need one."""

from __future__ import annotations

import pytest

from onnxpress.errors import ProviderError
from onnxpress.runtime.providers import check_provider


def why_not(name: str) -> str:
    """What is missing for a provider, empty where it loads."""
    try:
        check_provider(name)
    except ProviderError as error:
        return str(error)
    return ""


def loads(name: str) -> bool:
    return not why_not(name)


needs_openvino = pytest.mark.skipif(not loads("openvino"), reason=why_not("openvino"))
