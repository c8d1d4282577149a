"""Reads JSON files of model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnxpress.errors import SourceError


def read_json(path: Path) -> Any:
    """The content of a JSON file of a model folder. Raises SourceError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}. Download the model again.") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises SourceError."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise SourceError(f"{path} holds no object, with fields by name. Download the model again.")
    return content
