"""Figures as terminals and pages show them, and programs read them."""

from __future__ import annotations

import json
import sys

from onnxpress.manifest import Json


def megabytes(size: float) -> str:
    """A number of bytes in MB."""
    return f"{size / 1e6:.1f}" if size >= 1e6 else f"{size / 1e6:.3f}"


def print_json(content: Json) -> None:
    """One document on standard output, whatever that can write."""
    unicode = "utf" in (sys.stdout.encoding or "").lower()
    print(json.dumps(content, ensure_ascii=not unicode, indent=1))
