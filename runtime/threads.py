"""How many threads a session may have."""

from __future__ import annotations

import os
from typing import Any

from onnxpress.errors import ProviderError

_MOST = 1024  # more than processors have; far more than that end in the memory, or in ONNX Runtime's own words


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(provider: Any) -> None:
    """Raise ProviderError where a provider's `threads` is no count of them; None is all cores."""
    threads = provider.threads
    if threads is not None and (type(threads) is not int or not 1 <= threads <= _MOST):
        raise ProviderError(
            f"{type(provider).__name__}(threads={threads!r}): a whole number from 1 on is needed, {_MOST} at most; None takes all cores."
        )
