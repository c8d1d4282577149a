"""What an NVIDIA card gives, and how near onnxpress and torch come to it: encoders and decoders with random weights.

    python benchmarks/gpu/bench.py [--only roof encoder decoder] [--budget SECONDS] [--json FILE] [--whole]

Without a card it says so and measures nothing. What fails is written down and the rest goes on: each part runs in a process of its own,
since a failed check on the card ends a process's use of it. The JSON file is whole after every figure. `--provider cpu --tiny` runs all of it in small on the CPU: a test of these scripts, no measurement.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOTHING = "no GPU: nothing measured"
# The last takes longest to build.
PARTS = ("encoder minilm-l6", "decoder qwen2.5-0.5b", "decoder qwen2.5-7b", "encoder bert-base")
OVERTIME = 60  # seconds in which a part may end what it has begun
PACKAGES = ("torch", "transformers", "onnxruntime-gpu", "onnxruntime", "onnx", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help=f"parts whose names contain one of these: {', '.join(PARTS)}"
    )
    parser.add_argument("--budget", type=float, help="seconds after which no new measurement begins")
    parser.add_argument("--json", type=Path, default=ROOT / ".bench-cache" / "gpu.json")
    parser.add_argument(
        "--folder", type=Path, help="where models and artifacts are kept from run to run (default: beside the JSON)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.04, help="how long a system runs in a round, at least")
    parser.add_argument("--whole", action="store_true", help="torch.compile of whole models, too: minutes")
    parser.add_argument("--here", action="store_true", help="in this process, all parts after each other")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the scripts")
    arguments = parser.parse_args()
    if arguments.provider == "cpu" and not arguments.tiny:
        parser.error("--provider cpu is there to try the scripts: add --tiny")
    if arguments.rounds < 1:
        parser.error("--rounds takes a number from 1 on")
    if arguments.only and not any(word in part for part in (*PARTS, "roof") for word in arguments.only):
        parser.error(f"--only {' '.join(arguments.only)} names no part; there are: roof, {', '.join(PARTS)}")
    if arguments.provider == "cuda":
        if not has_card():
            print(NOTHING)
            return
        if problem := missing():
            sys.exit(f"There is an NVIDIA card, but {problem}")

    parts = [part for part in PARTS if not arguments.only or any(word in part for word in arguments.only)]
    if len(parts) > 1 and not arguments.here:
        sys.exit(_each_alone(arguments, parts))

    import card
    import decoders
    import encoders
    import record
    import roof
    import torch

    if arguments.tiny:
        torch.set_num_threads(1)

    found = card.Card(name=arguments.provider)
    versions = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    about = {
        "date": time.strftime("%Y-%m-%d"),
        **found.about(),
        "python": sys.version.split()[0],
        "versions": versions,
        "tiny": arguments.tiny,
        "rounds": arguments.rounds,
    }
    results = record.Record(
        arguments.json, about, budget=arguments.budget, rounds=arguments.rounds, seconds=arguments.seconds
    )
    folder = arguments.folder or arguments.json.parent / ("gpu-tiny" if arguments.tiny else "gpu")
    options = {"tiny": arguments.tiny, "whole": arguments.whole}
    roof.measure(results, found, tiny=arguments.tiny)  # shares are of it
    for part in parts:
        kind, _, name = part.partition(" ")
        with results.attempt(part):
            if kind == "encoder":
                encoders.measure(results, found, name, folder, **options)
            else:
                for bits in (16, 4):
                    decoders.measure(results, found, name, bits, **options)
    record.show(results.figures)
    print(f"{about['card']}, {', '.join(f'{name} {version}' for name, version in versions.items())}, {about['date']}")
    print("A cell is the median of the rounds' medians, with the fastest and the slowest round.")
    for failure in results.errors:
        print(f"failed: {failure['what']}: {failure['error']}")
    for what in results.left_out:
        print(f"left out for want of time: {what}")
    print(f"all of it: {arguments.json}")


def _each_alone(arguments: argparse.Namespace, parts: list[str]) -> int:
    """Run each part in a process of its own, one after the other, each with its own roof; and put their JSON files together."""
    began, status = time.monotonic(), 0
    whole: dict[str, Any] = {}
    for part in parts:
        path = arguments.json.with_name(f"{arguments.json.stem}-{part.replace(' ', '-')}.json")
        given = [sys.argv[0], "--here", "--only", part, "--json", str(path), "--provider", arguments.provider]
        given += [
            "--folder",
            str(arguments.folder or arguments.json.parent / ("gpu-tiny" if arguments.tiny else "gpu")),
        ]
        given += ["--rounds", str(arguments.rounds), "--seconds", str(arguments.seconds)]
        given += [option for option in ("--whole", "--tiny") if getattr(arguments, option[2:])]
        if arguments.budget is not None:
            given += ["--budget", str(max(0.0, arguments.budget - (time.monotonic() - began)))]
        path.unlink(missing_ok=True)
        left = None if arguments.budget is None else max(0.0, arguments.budget - (time.monotonic() - began)) + OVERTIME
        try:
            code = subprocess.run([sys.executable, *given], timeout=left).returncode
            ended = f"its process ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            code, ended = 1, f"it hung, and was ended {OVERTIME} s after the budget was spent"
        status = code or status
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name in ("figures", "errors", "left_out"):
            whole.setdefault(name, []).extend(found.get(name, []))
        if ended:
            whole["errors"].append({"what": part, "error": ended})
            print(f"failed: {part}: {ended}")
        whole["about"] = found.get("about", whole.get("about"))
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"all of it: {arguments.json}")
    return status


def has_card() -> bool:
    """Whether NVIDIA's driver is there and shows a card. The standard library is enough to ask."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def missing() -> str:
    """What else is needed to measure the card; empty where nothing is."""
    try:
        import torch

        from onnxpress.errors import OnnxpressError
        from onnxpress.runtime.providers import check_provider
    except ImportError as error:
        return f"{error}: python -m pip install 'onnxpress[build,gpu]', or add its folder to PYTHONPATH."
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} does not see it: install a build of torch for CUDA that the driver supports."
    try:
        check_provider("cuda")
    except OnnxpressError as error:
        return str(error)
    return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
