"""What every system under test shares: the number of threads, the token ids, and how a call is timed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# The export that OpenVINO reads, in the cache: ONNX Runtime's peer makes it, because its environment has PyTorch.
# OpenVINO fuses the attention of this form (and of opset 23), but not of scaled-dot-product attention at opset 18.
EXPORTED = "onnxruntime-fp32-eager-opset18.onnx"

Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a system may read. model: a sentence-transformers folder. cache: where exports of this model are kept.

    artifact: an onnxpress artifact. calibration: a JSON list of sentences.
    """

    model: Path
    cache: Path
    artifact: Path
    calibration: Path


def tokens(batch: int, length: int) -> dict[str, np.ndarray]:
    """The same random tokens for everybody, int64 (batch, length); no padding."""
    ids = np.random.default_rng(0).integers(1000, 20000, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def cpu_session(model: bytes) -> Any:
    """A session of a graph as it is, on THREADS."""
    import onnxruntime  # not every system's environment has it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def milliseconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Wall time of each of `repeats` calls, after two that do not count."""
    call()
    call()
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        durations.append(1000 * (time.perf_counter() - start))
    return durations


def fastest(calls: Mapping[Key, Callable[[], Any]]) -> Key:
    """The key of the fastest call.

    One look at all; those within a fifth of the best take turns for three rounds, and the median of the rounds' medians
    decides.
    """
    first = {key: min(milliseconds(call, 2)) for key, call in calls.items()}
    near = [key for key in calls if first[key] <= 1.2 * min(first.values())]
    if len(near) == 1:
        return near[0]
    rounds: dict[Key, list[float]] = {key: [] for key in near}
    for _ in range(3):
        for key in near:
            rounds[key].append(statistics.median(milliseconds(calls[key], 3)))
    return min(rounds, key=lambda key: statistics.median(rounds[key]))
