"""One system under test, as a process of its own in its own environment.

Speaks JSON lines: {"do": "shape", "batch": 1, "length": 32} and {"do": "texts", "file": …} on standard input, the
median milliseconds or the sentences per second on standard output. Blocked on its input while others are timed.

    python worker.py SYSTEM MODEL_FOLDER CACHE_FOLDER [ARTIFACT]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

THREADS = len(os.sched_getaffinity(0))


def main() -> None:
    system, model, cache, *rest = sys.argv[1:]
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, variant = system.partition(":")
    peer = import_module(f"peers.{module}").open_peer(variant, Path(model), Path(cache), rest[0] if rest else None)
    print(json.dumps({"ready": peer.describe()}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "shape":
            answer = {"ms": median_ms(peer.shape(request["batch"], request["length"]), request["seconds"])}
        else:
            texts = Path(request["file"]).read_text(encoding="utf-8").splitlines()
            call = peer.texts(texts)
            call()
            start = time.perf_counter()
            call()
            answer = {"per_second": len(texts) / (time.perf_counter() - start)}
        print(json.dumps(answer), file=answers, flush=True)


def median_ms(call: Callable[[], Any], seconds: float) -> float:
    """Median of the calls that fit into a time, at least five, after two that do not count."""
    call()
    call()
    durations: list[float] = []
    while len(durations) < 5 or sum(durations) < seconds:
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return 1000 * statistics.median(durations)


def tokens(batch: int, length: int) -> dict[str, np.ndarray]:
    """The same random tokens for everybody; no padding."""
    ids = np.random.default_rng(0).integers(1000, 20000, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    # `import worker` in a peer must find this module and not load it a second time.
    sys.modules["worker"] = sys.modules["__main__"]
    main()
