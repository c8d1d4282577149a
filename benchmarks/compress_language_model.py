"""A trained language model with a quarter of its numbers gone: perplexity and tokens a second, before and after.

    python benchmarks/compress_language_model.py --model FOLDER --data FOLDER [--out DIR] [--epochs 2] [--json FILE]

model: what benchmarks/train_language_model.py writes. data: the folder that it was trained on. Pruned are feed-forward channels; the student
learns, by its teacher's answers alone, from the text that its teacher learned from. Perplexity is that of held_out.txt, which
neither of them saw. Artifacts that are in DIR already are taken as they are, and so is a training whose checkpoints are there.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import report
from train_language_model import FILES, split_texts

import onnxpress
from onnxpress.artifact import Artifact
from onnxpress.decoder_workload import DecoderWorkload
from onnxpress.runtime import Generator
from onnxpress.timing import alternate

PROMPT, NEW = 128, 64
PRUNED = {"ffn": 0.4}
PRECISIONS = ("fp32", "int4-weights")
COLUMNS = ("million numbers", "MB", "perplexity", f"prompt {PROMPT}, tokens/s", f"decode after {PROMPT}, tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("artifacts/compressed-language-model"))
    parser.add_argument("--epochs", type=int, default=2, help="of distilling; 0 leaves it out")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    texts = arguments.out / "train.txt"
    texts.write_text(split_texts([arguments.data / name for name in FILES])[0], encoding="utf-8")
    distil = {
        "file": str(texts),
        "epochs": arguments.epochs,
        "batch_size": 8,
        "learning_rate": arguments.learning_rate,
        "hidden_weight": 0.0,
        "checkpoints": str(arguments.out / "checkpoints"),
    }
    ways: dict[str, dict[str, Any]] = {
        "whole": {},
        "pruned": {"prune": PRUNED},
    }
    if arguments.epochs:
        ways["pruned, distilled"] = {"prune": PRUNED, "distil": distil}
    built = {
        f"{way}, {precision}": _built(f"{way}, {precision}", precision, more, arguments)
        for way, more in ways.items()
        for precision in PRECISIONS
    }
    machine = report.facts()
    found = _measured(built, arguments)
    rows = {name: [f"{value:.4g}" for value in row] for name, row in found.items()}
    report.show("held-out text", rows, COLUMNS)
    report.show_machine(machine)
    report.save(arguments.json, {"machine": machine, "distil": distil, "columns": COLUMNS, "rows": found})


def _built(name: str, precision: str, more: dict[str, Any], arguments: argparse.Namespace) -> Artifact:
    folder = arguments.out / name.replace(", ", "-")
    if (folder / "manifest.json").is_file():
        return Artifact.open(folder)
    return onnxpress.build(
        str(arguments.model),
        out=folder,
        precision=precision,
        file=str(arguments.model / "held_out.txt"),
        calibration=str(arguments.model / "calibration.txt") if more else None,  # pruning looks at it
        keep_all=True,
        measure=False,
        quiet=False,
        **more,
    )


def _bytes(artifact: Artifact) -> int:
    """Size of the graph and its weights."""
    return sum(entry.size for file, entry in artifact.manifest.files.items() if file.startswith("model.onnx"))


def _measured(built: dict[str, Artifact], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """What COLUMNS says of each, the systems taking turns."""
    runners = {name: onnxpress.load(artifact.path) for name, artifact in built.items()}
    first = next(iter(built.values())).manifest
    workload = DecoderWorkload(
        signature=first.signature,
        options=first.options,
        tokenizer_folder=arguments.model,
        file=arguments.model / "held_out.txt",
        calibration=arguments.model / "calibration.txt",
        samples=64,
    )
    reference = workload.answers(runners["whole, fp32"].session)
    rows: dict[str, list[float]] = {}
    for name, runner in runners.items():
        in_float = built[f"{name.rpartition(', ')[0]}, fp32"]
        perplexity = workload.metrics(reference, workload.answers(runner.session))["perplexity"]
        rows[name] = [_bytes(in_float) / 4e6, _bytes(built[name]) / 1e6, perplexity]
    draw = np.random.default_rng(0)

    def generate(runner: Generator, count: int) -> None:
        prompt = draw.integers(5, 4000, PROMPT).tolist()  # a new one each time: what is known already is not read again
        for _ in runner.stream([prompt], max_new_tokens=count, ignore_eos=True):
            pass

    tasks: dict[Any, Any] = {}
    for name, runner in runners.items():
        tasks |= {(name, count): partial(generate, runner, count) for count in (1, 1 + NEW)}
    times = alternate(tasks, rounds=arguments.rounds, seconds=0.5)
    for name, row in rows.items():
        short, long = times[name, 1], times[name, 1 + NEW]
        row += [1000 * PROMPT / short, 1000 * NEW / (long - short)]
    return rows


if __name__ == "__main__":
    main()
