"""Runs a command and measures what it cost: wall time, and the memory of its whole process tree. Linux only."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """largest_process: the kernel's high-water mark of the largest process of the tree, bytes: exact.

    tree: the largest sum of resident memory over the tree that was seen, bytes; sampled, and pages that processes share
    count for each of them.
    """

    seconds: float
    largest_process: int
    tree: int


def run_measured(command: Sequence[str], *, sample_every: float | None = None) -> Usage:
    """Run the command to its end; its standard output goes nowhere. Ends this program when the command fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    done, peak = threading.Event(), [0]
    sampler = threading.Thread(target=_sample, args=(process.pid, sample_every or 0, done, peak))
    if sample_every is not None:
        sampler.start()
    _, status, resources = os.wait4(process.pid, 0)  # this child's and its descendants' high-water mark alone
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    done.set()
    if sample_every is not None:
        sampler.join()
    if process.returncode != 0:
        sys.exit(f"{' '.join(command[:3])} … failed with exit code {process.returncode}.")
    largest = resources.ru_maxrss * 1024
    return Usage(seconds=seconds, largest_process=largest, tree=max(peak[0], largest))


def _sample(root: int, every: float, done: threading.Event, peak: list[int]) -> None:
    while not done.wait(every):
        peak[0] = max(peak[0], sum(_resident(pid) for pid in _tree(root)))


def _tree(root: int) -> list[int]:
    """The process and all its descendants."""
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                waiting += map(int, children.read_text().split())
            except OSError:  # it ended meanwhile
                continue
    return found


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):  # it ended meanwhile
        return 0
