"""Times artifacts side by side on random token ids: taking turns, medians of several rounds.

Needs only the runtime. For comparisons with other tools see the benchmarks folder of the repository.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress import machine
from onnxpress.artifact import Artifact
from onnxpress.errors import OutputError, UsageError
from onnxpress.manifest import Arrays, Json, Signature
from onnxpress.runtime.loading import load_artifact
from onnxpress.timing import alternate


def bench(
    path: Path,
    *,
    against: Sequence[str],
    batches: Sequence[int],
    lengths: Sequence[int],
    rounds: int,
    json_file: Path | None,
    providers: Sequence[str] | None,
    allow_fallback: bool,
) -> int:
    """Print a table of median milliseconds; returns the exit code. against: folders of other artifacts."""
    runners = {}
    for folder in (path, *(Path(item) for item in against)):
        artifact = Artifact.open(folder)
        if artifact.manifest.task == "module":
            raise UsageError(f"{folder} takes named arrays of any shape; bench times models that read token ids.")
        label = artifact.manifest.name + " " + artifact.manifest.precision
        runners[label if label not in runners else str(folder)] = load_artifact(
            artifact, providers=providers, allow_fallback=allow_fallback
        )
    rows: list[dict[str, Json]] = []
    for batch in batches:
        for length in lengths:
            tasks: dict[str, Callable[[], object]] = {
                label: _task(runner, random_tokens(runner.session.signature, batch, length))
                for label, runner in runners.items()
            }
            times = alternate(tasks, rounds=rounds, seconds=0.2)
            for label, milliseconds in times.items():
                rows.append({"system": label, "batch": batch, "length": length, "median_ms": round(milliseconds, 3)})
                print(f"{label:40} batch {batch:4} length {length:5} {milliseconds:10.2f} ms", flush=True)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"The figures cannot be written to {json_file}: {error.strerror}.") from None
    return 0


def random_tokens(signature: Signature, batch: int, length: int) -> Arrays:
    """Random ids in the inputs' bounds, int64 (batch, length); masks are all ones, token types zeros."""
    random = np.random.default_rng(0)
    feeds = {}
    for spec in signature.inputs:
        if spec.name == "input_ids":
            low, high = spec.bounds or (0, 1000)
            feeds[spec.name] = random.integers(low, high + 1, (batch, length))
        else:
            feeds[spec.name] = np.full((batch, length), 1 if spec.name == "attention_mask" else 0, np.int64)
    return feeds


def _task(runner: Any, feeds: Arrays) -> Callable[[], object]:
    return lambda: runner.run_rows(feeds)
