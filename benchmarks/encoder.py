"""A sentence encoder beside other tools, on token ids: milliseconds of a batch, taking turns, medians of rounds.

    python benchmarks/encoder.py --model FOLDER --artifact DIR [--artifact-fp32 DIR] [--rounds 5] [--json FILE]

Each system is a process in its own environment (benchmarks/peers/setup.sh makes them) and waits, blocked, while the
others are timed. All run on as many threads as this process may use cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import report
import turns
from measure import EXPORTED
from turns import System

SHAPES = ((1, 32), (1, 128), (32, 128))

PEERS = [
    System(name="PyTorch fp32", environment="torch", peer="torch_eager:fp32"),
    System(name="PyTorch bf16", environment="torch", peer="torch_eager:bf16"),
    System(name="ONNX Runtime fp32", environment="onnxruntime", peer="onnxruntime_plain:fp32"),
    System(name="ONNX Runtime int8 (quantize_dynamic)", environment="onnxruntime", peer="onnxruntime_plain:int8"),
    System(name="OpenVINO fp32", environment="openvino", peer="openvino_static:fp32", needs=EXPORTED),
    System(name="OpenVINO bf16", environment="openvino", peer="openvino_static:bf16", needs=EXPORTED),
    System(name="OpenVINO int8 (NNCF)", environment="openvino", peer="openvino_static:int8", needs=EXPORTED),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    turns.add_arguments(parser)
    parser.add_argument(
        "--shapes", type=shape, nargs="+", default=SHAPES, metavar="BATCHxLENGTH", help="e.g. 1x32 8x64"
    )
    parser.add_argument(
        "--data", type=Path, help="folder whose *train*.csv calibrates NNCF instead of our own sentences"
    )
    arguments = parser.parse_args()
    machine = report.facts()
    cache = turns.cache_of(arguments.model, arguments.cache)
    calibration = turns.calibration_file(arguments.data, cache)
    systems = turns.chosen([*PEERS, *turns.ours(arguments)], arguments.only)

    columns = [f"{batch} x {length}" for batch, length in arguments.shapes]
    medians: dict[str, dict[str, list[float]]] = {system.name: {column: [] for column in columns} for system in systems}
    fastest: dict[str, dict[str, float]] = {system.name: {} for system in systems}
    settings: dict[str, dict[str, str]] = {system.name: {} for system in systems}
    with turns.workers(systems, model=arguments.model, cache=cache, calibration=calibration) as started:
        about: dict[str, Any] = {
            worker.name: {"description": worker.description, "versions": worker.versions} for worker in started
        }
        for batch, length in arguments.shapes:  # what a system looks for before its first answer is not for the rounds
            for worker in started:
                worker.ask("shape", batch=batch, length=length, repeats=1)
        for number in range(arguments.rounds):
            for column, (batch, length) in zip(columns, arguments.shapes, strict=True):
                for worker in turns.in_turns(started, number):
                    answer = worker.ask("shape", batch=batch, length=length, repeats=repeats(batch, length))
                    medians[worker.name][column].append(answer["median_ms"])
                    fastest[worker.name][column] = min(
                        answer["min_ms"], fastest[worker.name].get(column, answer["min_ms"])
                    )
                    settings[worker.name][column] = answer["setting"]
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)

    rows = {name: [report.spread(times[column]) for column in columns] for name, times in medians.items()}
    report.show("milliseconds at batch x length", rows, columns)
    quickest = {name: [f"{times[column]:.4g}" for column in columns] for name, times in fastest.items()}
    report.show("the same, the fastest call of all", quickest, columns)
    report.show_machine(machine)
    for name, item in about.items():
        best = "; ".join(f"{column}: {setting}" for column, setting in settings[name].items() if setting)
        print(f"{name}: {item['description']}{f' ({best})' if best else ''}")
    report.save(
        arguments.json,
        {
            "machine": machine,
            "rounds": arguments.rounds,
            "calibration": str(arguments.data.name) if arguments.data else "onnxpress sentences",
            "systems": about,
            "settings": settings,
            "median_ms": {
                name: {column: statistics.median(values) for column, values in times.items()}
                for name, times in medians.items()
            },
            "round_medians_ms": medians,
            "min_ms": fastest,
        },
    )


def shape(text: str) -> tuple[int, int]:
    """Batch and length of e.g. 32x128."""
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def repeats(batch: int, length: int) -> int:
    """Timed calls of a turn: the fewer, the longer one takes; 50 for (1, 32), 32 for (1, 128), 5 for (32, 128)."""
    return max(5, min(50, 4096 // (batch * length)))


if __name__ == "__main__":
    main()
