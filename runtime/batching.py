"""Cuts work into chunks of rows of like length, and runs the chunks: on all cores together, or one lane a core.

A batch with more than one chunk runs in lanes on the CPU: each core runs whole chunks in a session with one thread,
so no operator waits for another core and a chunk's activations stay in the core's own cache.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from onnxpress.manifest import Arrays, Runnable
from onnxpress.runtime.session import Session

T = TypeVar("T")
Chunk = TypeVar("Chunk")
_BAR_AFTER = 1.0  # seconds

_pools: dict[int, ThreadPoolExecutor] = {}  # by number of lanes; more runners do not make more cores
_pool_lock = threading.Lock()


def plan(lengths: Sequence[int], tokens_per_chunk: int, most_rows: int | None = None) -> list[npt.NDArray[np.int64]]:
    """Row numbers of each chunk: rows of like length together, rows x longest length at most tokens_per_chunk, and no more than
    most_rows.

    A row that is longer than that is a chunk of its own. Longest chunks come first, so that lanes end together.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")[::-1]
    chunks: list[npt.NDArray[np.int64]] = []
    start = 0
    while start < len(order):
        rows = max(1, tokens_per_chunk // max(1, lengths[order[start]]))
        rows = rows if most_rows is None else min(rows, most_rows)
        chunks.append(order[start : start + rows])
        start += rows
    return chunks


def run_chunks(
    runnable: Runnable, chunks: Sequence[Chunk], inputs: Callable[[Chunk], Arrays]
) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Answers of all chunks in their order; `inputs` makes the arrays of a chunk.

    Shows a progress bar on a terminal when it takes longer than a second.
    """
    if len(chunks) > 1 and isinstance(runnable, Session) and runnable.on_cpu and runnable.threads > 1:
        answers = _lanes(runnable.threads).map(lambda chunk: runnable.run_on_one_thread(inputs(chunk)), chunks)
        return list(_with_bar(answers, len(chunks)))
    return list(_with_bar((runnable.run(inputs(chunk)) for chunk in chunks), len(chunks)))


def _lanes(count: int) -> ThreadPoolExecutor:
    with _pool_lock:
        if count not in _pools:
            _pools[count] = ThreadPoolExecutor(count, thread_name_prefix="onnxpress-lane")
        return _pools[count]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def _with_bar(answers: Iterator[T], total: int) -> Iterator[T]:
    started, bar = time.monotonic(), None
    for count, answer in enumerate(answers, start=1):
        if bar is None and total > 1 and time.monotonic() - started > _BAR_AFTER and sys.stderr.isatty():
            from tqdm import tqdm

            bar = tqdm(total=total, initial=count - 1, unit="chunk", leave=False)
        if bar is not None:
            bar.update()
        yield answer
    if bar is not None:
        bar.close()
