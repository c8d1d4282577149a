"""Prints a table for people and as markdown, and writes figures with the facts about the machine to a file."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onnxpress import machine


def facts() -> dict[str, Any]:
    """The machine, the date, and how busy the machine is before anything starts."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        Console(stderr=True).print(
            f"[yellow]Other programs are using this machine (load {load:.1f}): its timings are not worth keeping.[/yellow]"
        )
    return {**machine.describe(), "date": time.strftime("%Y-%m-%d"), "load_before": round(load, 2)}


def spread(values: Sequence[float]) -> str:
    """Median of the rounds, and their range."""
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{statistics.median(values):.4g} ({min(values):.4g}–{max(values):.4g})"


def show(title: str, rows: Mapping[str, Sequence[str]], columns: Sequence[str]) -> None:
    """The table twice: for the terminal, and as markdown rows for a README."""
    table = Table("", *columns, title=title, title_justify="left")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console().print(table)
    print("\n| " + " | ".join((title, *columns)) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, cells in rows.items():
        print("| " + " | ".join((name, *cells)) + " |")
    print(flush=True)


def show_machine(machine_facts: Mapping[str, Any]) -> None:
    """One line under a table: where its figures come from."""
    print(
        f"{machine_facts['processor']}, {', '.join(machine_facts['instruction_sets'])}, "
        f"{machine_facts['cores']} threads, {machine_facts['system']}, {machine_facts['date']}",
        flush=True,
    )


def save(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write JSON, when a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
