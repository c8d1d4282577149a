"""Process start to answer: `onnxpress run` on one sentence, against a bare script with onnxruntime and tokenizers.

    python benchmarks/cold_start.py --artifact DIR [--runs 10] [--json FILE]

Both open the same model file on the same number of threads, taking turns; one run of each fills the disk cache and does
not count. Memory is the kernel's high-water mark of resident memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import report
from processes import run_measured

BARE = """
import os, sys, numpy, onnxruntime, tokenizers
folder = sys.argv[1]
tokenizer = tokenizers.Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.no_padding()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = len(os.sched_getaffinity(0))
session = onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
encoding = tokenizer.encode(sys.argv[2])
arrays = dict(input_ids=encoding.ids, attention_mask=encoding.attention_mask, token_type_ids=encoding.type_ids)
feeds = {value.name: numpy.array([arrays[value.name]]) for value in session.get_inputs()}
print(session.run(None, feeds)[0][0].tolist())
"""
TEXT = "How long does it take from the first instruction to the answer?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = report.facts()
    onnxpress = str(Path(sys.executable).parent / "onnxpress")
    commands = {
        "onnxpress run": [onnxpress, "run", str(arguments.artifact), "--text", TEXT],
        "bare script": [sys.executable, "-c", BARE, str(arguments.artifact), TEXT],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    mebibytes: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(arguments.runs + 1):
        for name, command in commands.items():
            usage = run_measured(command)
            if number > 0:
                seconds[name].append(usage.seconds)
                mebibytes[name].append(usage.largest_process / 2**20)

    rows = {name: [report.spread(seconds[name]), f"{statistics.median(mebibytes[name]):.0f}"] for name in commands}
    report.show("process start to answer", rows, ["seconds", "peak MiB"])
    report.show_machine(machine)
    report.save(arguments.json, {"machine": machine, "seconds": seconds, "peak_mebibytes": mebibytes})


if __name__ == "__main__":
    main()
