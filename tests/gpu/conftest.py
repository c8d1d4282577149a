"""Tests that need an NVIDIA card. Where there is none they are skipped, and the last line of the run says so."""

from __future__ import annotations

from typing import Any

import pytest

from onnxpress.errors import OnnxpressError
from onnxpress.runtime.providers import check_provider


def _missing() -> str:
    try:
        check_provider("cuda")
    except OnnxpressError as error:
        return str(error)
    return ""


WHY = _missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if WHY:
        for item in items:
            if "tests/gpu" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=f"no NVIDIA card: {WHY}"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if WHY:
        terminalreporter.write_line(f"tests/gpu: NOTHING WAS CHECKED ON A CARD: {WHY}", yellow=True)
