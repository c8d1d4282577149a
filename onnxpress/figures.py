"""Figures as terminals and pages show them."""

from __future__ import annotations


def megabytes(size: float) -> str:
    """A number of bytes in MB, of small ones three figures."""
    return f"{size / 1e6:.1f}" if size >= 1e7 else f"{size / 1e6:.3g}"
