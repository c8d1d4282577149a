"""What a build costs: wall seconds and peak memory of `onnxpress build`, its helper processes included.

Without mapped files is what the build says of itself; the others count a page of a file once for each place it is mapped to.

    python benchmarks/build_cost.py [--runs 3] [--json FILE] -- MODEL [options of onnxpress build]

The artifact goes to a temporary folder; do not give --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import report
from processes import run_measured

SAMPLE_EVERY = 0.05  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("build", nargs="+", metavar="MODEL …", help="what follows `onnxpress build`")
    arguments = parser.parse_args()
    machine = report.facts()
    onnxpress = str(Path(sys.executable).parent / "onnxpress")
    usages, own = [], []
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory(prefix="onnxpress-build-cost-") as scratch:
            command = [onnxpress, "build", *arguments.build, "--out", str(Path(scratch) / "artifact")]
            usages.append(run_measured(command, sample_every=SAMPLE_EVERY))
            own.append(json.loads((Path(scratch) / "artifact" / "measured.json").read_text())["peak_memory_bytes"])

    seconds = [usage.seconds for usage in usages]
    largest = statistics.median(usage.largest_process for usage in usages) / 2**20
    tree = statistics.median(usage.tree for usage in usages) / 2**20
    title = f"onnxpress build {' '.join(arguments.build)}"
    without_files = statistics.median(own) / 2**20
    columns = ["seconds", "peak MiB without mapped files", "peak MiB, largest process", "peak MiB, all processes"]
    row = [report.spread(seconds), f"{without_files:.0f}", f"{largest:.0f}", f"{tree:.0f}"]
    report.show("build", {title: row}, columns)
    report.show_machine(machine)
    report.save(
        arguments.json,
        {
            "machine": machine,
            "command": title,
            "seconds": seconds,
            "peak_memory_bytes": own,
            "largest_process_bytes": [usage.largest_process for usage in usages],
            "tree_bytes": [usage.tree for usage in usages],
        },
    )


if __name__ == "__main__":
    main()
