"""An interrupt at a step that no clock hits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def interrupt_rename(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Raise KeyboardInterrupt right behind the so many-th rename of a path, as Ctrl-C does where it is not ignored."""
    rename, steps = Path.rename, [0]

    def interrupted(path: Path, to: Any) -> Path:
        renamed = rename(path, to)
        steps[0] += 1
        if steps[0] == step:
            raise KeyboardInterrupt
        return renamed

    monkeypatch.setattr(Path, "rename", interrupted)
