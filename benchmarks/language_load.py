"""How long language models take to open, beside other engines, and how much memory they hold after a short answer.

    python benchmarks/language_load.py --model FOLDER --artifact NAME=DIR [NAME=DIR …] [--rounds 5] [--json FILE]

Each engine opens its own quantized form of the model in FOLDER (benchmarks/language_speed.py makes them) in a process of its own,
anew in every round; files are in the page cache. Seconds are those of importing the engine and opening the model. Resident memory
is the process's, Python included; mapped is the part of it that is files, which the system can drop.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import report
import turns
from language_speed import PEERS
from turns import System

COLUMNS = ("seconds to open", "MiB resident", "MiB of it mapped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--artifact", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=turns.ROOT / ".bench-cache")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = report.facts()
    cache = turns.cache_of(arguments.model, arguments.cache)
    ours = [item.partition("=") for item in arguments.artifact]
    systems = PEERS + [
        System(name=f"onnxpress {name}", environment=None, peer="ours_decoder:-", artifact=Path(folder))
        for name, _, folder in ours
    ]
    found: dict[str, dict[str, list[float]]] = {system.name: {column: [] for column in COLUMNS} for system in systems}
    for number in range(-1, arguments.rounds):  # the first may have to make the peers' models; it is not counted
        for system in systems:
            with turns.workers([system], model=arguments.model, cache=cache, calibration=cache) as (worker,):
                worker.ask("generate", prompt=[5, 6, 7, 8], count=4)
                memory = worker.ask("memory")
                values = (worker.seconds, memory["resident_bytes"] / 2**20, memory["mapped_bytes"] / 2**20)
                for column, value in zip(COLUMNS, values, strict=True):
                    if number >= 0:
                        found[system.name][column].append(value)
    rows = {name: [report.spread(values) for values in columns.values()] for name, columns in found.items()}
    report.show("one model, opened", rows, list(COLUMNS))
    report.show_machine(machine)
    report.save(arguments.json, {"machine": machine, "rounds": arguments.rounds, "systems": found})


if __name__ == "__main__":
    main()
