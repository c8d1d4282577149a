"""SIGTERM ends a command as an interrupt does: what a build has begun is removed on the way out."""

from __future__ import annotations

import signal
import sys
from typing import Any

_told = False


def on_terminate(*_: Any) -> None:
    """The handler of SIGTERM."""
    global _told
    _told = True
    end_if_told()


def end_if_told() -> None:
    """What long work calls at each step: Python drops an exception that the handler raises in a weak reference's callback or `__del__`."""
    if _told:
        sys.exit(128 + signal.SIGTERM)
