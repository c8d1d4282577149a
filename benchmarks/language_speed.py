"""A language model beside other engines: prompt and decode speed of one sequence, taking turns, medians of rounds.

    python benchmarks/language_speed.py --model FOLDER --artifact NAME=DIR [NAME=DIR …] [--rounds 5] [--json FILE]

Each engine is a process in its own environment (benchmarks/peers/setup.sh) with as many threads as this one may use cores,
and makes its own quantized form of the model in FOLDER. Prompts are random tokens, new in every round, so that no engine can
have seen them. Tokens per second: the prompt's over the time to the first new token, then new tokens after it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import report
import turns
from turns import System

PROMPTS, NEW = (128, 1024), 64
PEERS = [
    System(name="llama.cpp Q4_0", environment="llama_cpp", peer="llama_cpp_decoder:q4_0"),
    System(name="onnxruntime-genai int4", environment="onnxruntime_genai", peer="genai_decoder:int4"),
    System(name="OpenVINO GenAI int4", environment="openvino_genai", peer="openvino_decoder:int4"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--artifact", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="systems whose names contain one of these")
    parser.add_argument("--cache", type=Path, default=turns.ROOT / ".bench-cache")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ours = []
    for item in arguments.artifact:
        name, _, folder = item.partition("=")
        ours.append(System(name=f"onnxpress {name}", environment=None, peer="ours_decoder:-", artifact=Path(folder)))
    machine = report.facts()
    cache = turns.cache_of(arguments.model, arguments.cache)
    systems = turns.chosen([*PEERS, *ours], arguments.only)
    columns = [f"{kind} {length}" for length in arguments.prompts for kind in ("prompt", "decode after")]
    speeds: dict[str, dict[str, list[float]]] = {system.name: {column: [] for column in columns} for system in systems}
    random = np.random.default_rng(0)
    with turns.workers(systems, model=arguments.model, cache=cache, calibration=cache) as started:
        about: dict[str, Any] = {
            worker.name: {"description": worker.description, "versions": worker.versions} for worker in started
        }
        for number in range(-1, arguments.rounds):  # the first is not counted
            for length in arguments.prompts:
                for worker in turns.in_turns(started, max(number, 0)):
                    prompt = random.integers(5, 4000, length).tolist()
                    answer = worker.ask("generate", prompt=prompt, count=NEW if number >= 0 else 4)
                    if number >= 0:
                        speeds[worker.name][f"prompt {length}"].append(length / answer["prompt_seconds"])
                        speeds[worker.name][f"decode after {length}"].append(1 / answer["token_seconds"])
            if number >= 0:
                print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    rows = {name: [report.spread(values) for values in found.values()] for name, found in speeds.items()}
    report.show("tokens a second", rows, columns)
    report.show_machine(machine)
    for name, item in about.items():
        print(f"{name}: {item['description']}")
    report.save(
        arguments.json,
        {"machine": machine, "rounds": arguments.rounds, "systems": about, "tokens_per_second": speeds},
    )


if __name__ == "__main__":
    main()
