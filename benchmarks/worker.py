"""One system under test, as a process of its own in its own environment.

Speaks JSON lines, requests on standard input and answers on standard output; blocked on its input while others are
timed. The first answer, {"ready": …, "seconds": …, "versions": …}, comes without a request; the seconds are those of importing and
opening.

    {"cmd": "shape", "batch": 1, "length": 32, "repeats": 30}  ->  {"median_ms": …, "min_ms": …, "setting": …}
    {"cmd": "texts", "path": "texts.json", "batch_size": 32}   ->  {"sentences_per_second": …}
    {"cmd": "generate", "prompt": [5, 7], "count": 64}         ->  {"prompt_seconds": …, "token_seconds": …}
    {"cmd": "memory"}                                          ->  {"resident_bytes": …}, of which files: "mapped_bytes"
    {"cmd": "quit"}                                            ->  the process ends

    python worker.py MODULE:VARIANT --model FOLDER --cache FOLDER --artifact FOLDER --calibration FILE
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from measure import Setting, milliseconds

PACKAGES = ("onnxpress", "torch", "transformers", "sentence-transformers", "onnxruntime", "openvino", "nncf")
PACKAGES += ("llama_cpp_python", "onnxruntime-genai", "openvino-genai", "optimum-intel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system")
    for name in ("model", "cache", "artifact", "calibration"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = vars(parser.parse_args())
    module, _, variant = arguments.pop("system").partition(":")

    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start = time.perf_counter()
    peer = import_module(f"peers.{module}").open_peer(variant, Setting(**arguments))
    seconds = time.perf_counter() - start
    print(json.dumps({"ready": peer.description, "seconds": seconds, "versions": versions()}), file=answers, flush=True)
    warm: set[str] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if request["cmd"] == "quit":
            return
        if request["cmd"] == "memory":
            answer = memory()
        elif request["cmd"] == "generate":
            answer = peer.generate(request["prompt"], request["count"])
        else:
            answer = time_shape(peer, **request) if request["cmd"] == "shape" else time_texts(peer, warm, **request)
        print(json.dumps(answer), file=answers, flush=True)


def time_shape(peer: Any, *, cmd: str, batch: int, length: int, repeats: int) -> dict[str, Any]:
    call, setting = peer.shape(batch, length)
    durations = milliseconds(call, repeats)
    return {"median_ms": statistics.median(durations), "min_ms": min(durations), "setting": setting}


def time_texts(peer: Any, warm: set[str], *, cmd: str, path: str, batch_size: int) -> dict[str, Any]:
    texts = json.loads(Path(path).read_text(encoding="utf-8"))
    if path not in warm:  # memory for every length is reserved on the first pass
        peer.embed(texts, batch_size)
        warm.add(path)
    start = time.perf_counter()
    peer.embed(texts, batch_size)
    return {"sentences_per_second": len(texts) / (time.perf_counter() - start)}


def memory() -> dict[str, Any]:
    """Of this process, as Linux counts it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, mapped = (1024 * int(status[name].split()[0]) for name in ("VmRSS", "RssFile"))
    return {"resident_bytes": resident, "mapped_bytes": mapped}


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
