"""Silences the libraries that export a model: their log lines, warnings and progress bars. Restores all of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

_LOGGERS = ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir", "transformers")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep errors, drop everything below.

    What these libraries warn about in a trace (axis names, missing optional packages, their own deprecations) says
    nothing about the result and changes with every version; the numbers are compared afterwards in any case.
    """
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
