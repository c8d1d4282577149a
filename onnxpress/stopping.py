"""SIGTERM and a terminal that closes end a command as an interrupt does: what a build has begun is removed on the way out."""

from __future__ import annotations

import signal
import sys
from typing import Any

_told = 0  # the signal's number
_times = 0


def end_on_signals() -> None:
    """Have SIGTERM and SIGHUP end this process in order; not SIGHUP where it is ignored, as nohup has it."""
    for number in (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


def end_if_told() -> None:
    """What long work calls at each step: Python drops an exception that the handler raises in a weak reference's callback or `__del__`."""
    if _told:
        sys.exit(128 + _told)


def _on_signal(number: int, _: Any) -> None:
    global _told, _times
    _told, _times = _told or number, _times + 1
    if _times != 2:  # a second one would end the tidying; from a third on that is what is wanted
        end_if_told()
