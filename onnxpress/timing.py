"""Times things against each other on a noisy machine: alternating, a median of each round, then of the rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np

from onnxpress.manifest import Arrays, Signature

_PAUSE = 0.1  # seconds in which the threads of the task before, which spin for a while, fall asleep


def alternate(tasks: Mapping[str, Callable[[], object]], *, rounds: int = 5, seconds: float = 0.05) -> dict[str, float]:
    """Median milliseconds of each task: the median of `rounds_of` it."""
    found = rounds_of(tasks, rounds=rounds, seconds=seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def rounds_of(
    tasks: Mapping[str, Callable[[], object]], *, rounds: int = 5, seconds: float = 0.05
) -> dict[str, list[float]]:
    """Milliseconds of each task in each round, of which each is a median.

    The tasks take turns, with a pause between them; in each of `rounds` rounds a task runs for about `seconds` and at
    least once, after one call that is not counted. Calls that take as long as that by themselves need none but the first.
    """
    medians: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            time.sleep(_PAUSE)
            if not medians[name] or medians[name][-1] < seconds:
                task()
            durations: list[float] = []
            while not durations or (sum(durations) < seconds and len(durations) < 200):
                start = time.perf_counter()
                task()
                durations.append(time.perf_counter() - start)
            medians[name].append(statistics.median(durations))
    return {name: [1000 * value for value in values] for name, values in medians.items()}


def random_tokens(signature: Signature, batch: int, length: int, *, closing_token_id: int | None = None) -> Arrays:
    """Random ids in the inputs' bounds, int64 (batch, length); masks are all ones, token types zeros.

    closing_token_id: the last of each text, and nowhere else.
    """
    random = np.random.default_rng(0)
    feeds = {}
    for spec in signature.inputs:
        if spec.name == "input_ids":
            low, high = spec.bounds or (0, 1000)
            tokens = random.integers(low, high + 1, (batch, length))
            if closing_token_id is not None:
                tokens[tokens == closing_token_id] = low if closing_token_id != low else low + 1
                tokens[:, -1] = closing_token_id
            feeds[spec.name] = tokens
        else:
            feeds[spec.name] = np.full((batch, length), 1 if spec.name == "attention_mask" else 0, np.int64)
    return feeds
