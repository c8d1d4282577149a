"""Figures as terminals and pages show them."""

from __future__ import annotations


def megabytes(size: float) -> str:
    """A number of bytes in MB."""
    return f"{size / 1e6:.1f}" if size >= 1e6 else f"{size / 1e6:.3f}"
