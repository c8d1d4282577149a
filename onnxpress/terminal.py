"""What a build shows on a terminal: the step it is at, and a table of the ledger."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from onnxpress.artifact import REPORT, Artifact
from onnxpress.figures import megabytes
from onnxpress.stopping import end_if_told

_SAY_EVERY = 60  # seconds


class _Console(Console):
    """Rich's, which ends the process with code 1 where nobody reads on."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Progress:
    """Steps on stderr: a spinner on a terminal; elsewhere a line a step, and one a minute within; nothing where it is not enabled.

    Nor where it cannot be written any more: no work is lost for it.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._console = _Console(file=sys.stderr, quiet=not enabled, highlight=False)
        self._status: Status | None = None
        self._name = ""
        self._started = self._said = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(failed=error is not None)

    def step(self, name: str) -> None:
        """Begin a step."""
        end_if_told()
        self._finish()
        self._name = name
        self._started = self._said = time.perf_counter()
        if self._console.is_terminal:
            self._status = self._console.status(escape(name))
            self._show(self._status.start)

    def detail(self, text: str) -> None:
        """Say what the step is at."""
        end_if_told()
        if self._status is not None:
            self._show(partial(self._status.update, escape(f"{self._name}: {text}")))
        elif time.perf_counter() - self._said > _SAY_EVERY:
            self._show(partial(self._console.print, f"  [dim]{escape(f'{self._name}: {text}')}[/dim]"))
            self._said = time.perf_counter()

    def _finish(self, *, failed: bool = False) -> None:
        if self._status is not None:
            self._show(self._status.stop)
            self._status = None
        if self._name:
            mark = "[red]failed[/red]" if failed else f"[dim]{time.perf_counter() - self._started:.1f} s[/dim]"
            self._show(partial(self._console.print, f"  {escape(self._name)} {mark}"))
            self._name = ""

    def _show(self, show: Callable[[], object]) -> None:
        try:
            show()
        except OSError:
            self._console.quiet = True
            with contextlib.suppress(OSError):  # so that nothing fails at the interpreter's exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def print_build(artifact: Artifact) -> None:
    """The ledger as a table, and where the artifact is."""
    console = _Console(highlight=False)
    console.print(ledger_table(artifact))
    times = {row["pass"]: row for row in artifact.measured.get("rows", ())}
    for row in artifact.manifest.ledger:
        if row["status"] != "unchanged" or row["notes"]:
            share = times.get(row["pass"], {}).get("share_of_time")
            said = [row["reason"], *([] if share is None else [f"{share:.2f} × the time of float"]), *row["notes"]]
            console.print(f"{row['pass']}: {'; '.join(said)}", style="dim", soft_wrap=True, markup=False)
    if artifact.measured.get("note"):
        console.print(artifact.measured["note"], style="yellow", soft_wrap=True, markup=False)
    size = sum(entry.size for entry in artifact.manifest.files.values())
    seconds, memory = artifact.measured["build_seconds"], artifact.measured["peak_memory_bytes"]
    console.print(
        f"[bold]{escape(str(artifact.path))}[/bold]: {megabytes(size)} MB, {artifact.manifest.precision}; built in "
        f"{seconds:.0f} s{f' with {memory / 1e9:.2f} GB of memory' if memory else ''}; report: {escape(str(artifact.path / REPORT))}",
        soft_wrap=True,
    )


def ledger_table(artifact: Artifact) -> Table:
    """One row a pass: what became of it, quality, size, time.

    Where the terminal is narrow, names fold before figures do; nothing is cut off or left out.
    """
    metric = artifact.manifest.ledger[0]["metric"]
    title = escape(f"{artifact.manifest.name} for {artifact.manifest.target}; quality is {metric}")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("pass", overflow="fold")
    table.add_column("", overflow="fold")
    for name in ("changes", "quality", "MB", "ms"):
        table.add_column(name, justify="right", overflow="fold", no_wrap=name in ("quality", "MB"))
    times = {row["pass"]: row for row in artifact.measured.get("rows", ())}
    for row in artifact.manifest.ledger:
        table.add_row(
            escape(row["pass"]),
            {
                "kept": "[green]kept[/green]",
                "repaired": "[yellow]repaired[/yellow]",
                "unchanged": "[dim]unchanged[/dim]",
                "lost": "[dim]lost[/dim]",
            }.get(row["status"], f"[red]{row['status']}[/red]"),
            str(row["changes"] or "–"),
            _quality(row),
            megabytes(row["bytes"]),
            _times(times.get(row["pass"])),
        )
    return table


def _quality(row: Any) -> str:
    return "" if row["quality"] is None else f"{row['quality']:.5g}"


def _times(row: Any) -> str:
    return "" if row is None else f"{row['latency_before_ms']:.3g} → {row['latency_ms']:.3g}"
