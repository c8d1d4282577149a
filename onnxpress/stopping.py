"""SIGTERM and a terminal that closes end a command as an interrupt does: what a build has begun is removed on the way out."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_ENDING = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
_told = 0  # the signal's number


def end_on_signals() -> None:
    """Have SIGTERM and SIGHUP end this process in order; not SIGHUP where it is ignored, as nohup has it."""
    for number in _ENDING[1:]:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


def end_if_told() -> None:
    """What long work calls at each step: Python drops an exception that the handler raises in a weak reference's callback or `__del__`."""
    if _told:
        sys.exit(128 + _told)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that would end the process, or raise an exception in it, wait until this is over."""
    told: list[int] = []
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # handlers are its matter
        before = {number: handler for number in _ENDING if (handler := signal.getsignal(number)) is not None}
    for number in before:
        signal.signal(number, lambda number, _: told.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in told:
        signal.raise_signal(number)


def _on_signal(number: int, _: Any) -> None:
    global _told
    _told = number
    end_if_told()
