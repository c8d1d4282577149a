"""Process start to answer: `onnxpress run` on one sentence, against a bare script with onnxruntime and tokenizers.

python benchmarks/cold_start.py ARTIFACT [--runs 10]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

BARE = """
import sys, numpy, onnxruntime, tokenizers
folder = sys.argv[1]
tokenizer = tokenizers.Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.no_padding()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = len(__import__("os").sched_getaffinity(0))
session = onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
encoding = tokenizer.encode(sys.argv[2])
arrays = dict(input_ids=encoding.ids, attention_mask=encoding.attention_mask, token_type_ids=encoding.type_ids)
feeds = {value.name: numpy.array([arrays[value.name]]) for value in session.get_inputs()}
print(session.run(None, feeds)[0][0, :8])
"""
TEXT = "How long does it take from the first instruction to the answer?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    ours = str(Path(sys.executable).parent / "onnxpress")
    commands = {
        "onnxpress run": [ours, "run", str(arguments.artifact), "--text", TEXT],
        "bare script": [sys.executable, "-c", BARE, str(arguments.artifact), TEXT],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(arguments.runs + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            seconds[name].append(time.perf_counter() - start)
            memory[name].append(usage.ru_maxrss / 1024)
            if status != 0:
                sys.exit(f"{name} failed")
    print("| cold start | seconds | peak MiB |")
    print("|---|---|---|")
    for name in commands:  # the first run fills the disk cache and does not count
        print(f"| {name} | {statistics.median(seconds[name][1:]):.2f} | {statistics.median(memory[name][1:]):.0f} |")


if __name__ == "__main__":
    main()
