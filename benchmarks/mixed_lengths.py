"""Sentences a second on real sentences of mixed lengths, tokenization included: taking turns, medians of rounds.

    python benchmarks/mixed_lengths.py --model FOLDER --artifact DIR [--artifact-fp32 DIR] --data PAIRS.csv [--rounds 5]

PAIRS.csv: sentence1, sentence2, score, without a header; both sentences count. sentence-transformers gets all sentences
in one call with batches of 32 (it sorts them by length itself), our Embedder gets them in one call too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import report
import turns
from turns import System

BATCH_SIZE = 32
PEERS = [
    System(name="sentence-transformers, torch", environment="torch", peer="sentence_transformers_texts:torch"),
    System(
        name="sentence-transformers, ONNX", environment="sentence_transformers", peer="sentence_transformers_texts:onnx"
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    turns.add_arguments(parser)
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    machine = report.facts()
    texts = [text for first, second, _ in turns.read_pairs(arguments.data) for text in (first, second)]
    cache = turns.cache_of(arguments.model, arguments.cache)
    path = cache / "texts.json"
    path.write_text(json.dumps(texts), encoding="utf-8")
    systems = turns.chosen([*PEERS, *turns.ours(arguments)], arguments.only)

    rates: dict[str, list[float]] = {system.name: [] for system in systems}
    with turns.workers(systems, model=arguments.model, cache=cache, calibration=path) as started:
        about = {worker.name: {"description": worker.description, "versions": worker.versions} for worker in started}
        for number in range(arguments.rounds):
            for worker in turns.in_turns(started, number):
                answer = worker.ask("texts", path=str(path), batch_size=BATCH_SIZE)
                rates[worker.name].append(answer["sentences_per_second"])
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)

    report.show(
        "sentences a second", {name: [report.spread(values)] for name, values in rates.items()}, ["median (range)"]
    )
    report.show_machine(machine)
    for name, item in about.items():
        print(f"{name}: {item['description']}")
    report.save(
        arguments.json,
        {
            "machine": machine,
            "rounds": arguments.rounds,
            "sentences": len(texts),
            "batch_size": BATCH_SIZE,
            "systems": about,
            "median_sentences_per_second": {name: statistics.median(values) for name, values in rates.items()},
            "rounds_sentences_per_second": rates,
        },
    )


if __name__ == "__main__":
    main()
