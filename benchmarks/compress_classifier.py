"""A fine-tuned classifier at several sizes: accuracy against milliseconds, pruned, distilled and int8, beside PyTorch.

    python benchmarks/compress_classifier.py --model FOLDER --data FOLDER [--out DIR] [--sizes NAME …] [--pieces 5] [--json FILE] [--plot FILE]

model: a classifier fine-tuned on SST-2's training sentences (benchmarks/fit.py leaves one). data: the folder that has
sst2/stsa.binary.train and .dev. Students learn from the training sentences without their labels; accuracy is that of the dev
sentences, of which no part of a build sees anything else. Artifacts that are in DIR already are taken as they are.
"""

from __future__ import annotations

import argparse
import csv
from functools import partial
from pathlib import Path
from typing import Any

import report
import torch
import transformers
from measure import THREADS

import onnxpress
from onnxpress.artifact import Artifact
from onnxpress.timing import alternate, random_tokens

SHAPES = ((1, 32), (1, 128), (32, 32))
HEADS_AND_CHANNELS = {"heads": 0.34, "ffn": 0.5}
SIZES: dict[str, dict[str, float]] = {
    "int8": {},
    "heads -34 %, channels -50 %": HEADS_AND_CHANNELS,
    "4 of 6 layers": {"layers": 2},
    "4 of 6 layers, heads -34 %, channels -50 %": {**HEADS_AND_CHANNELS, "layers": 2},
    "3 of 6 layers, heads -34 %, channels -50 %": {**HEADS_AND_CHANNELS, "layers": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("artifacts/compressed"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="NAME")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pieces", type=int, default=0, help="of each sentence, that are learned from too")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an image: accuracy against milliseconds")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    train, dev = (_as_csv(arguments.data / "sst2" / f"stsa.binary.{part}", arguments.out) for part in ("train", "dev"))
    built = {name: _built(name, arguments, train, dev) for name in arguments.sizes}
    machine = report.facts()
    rows = _measured(built, arguments.model, arguments.rounds)
    columns = ["accuracy", "MB", *(f"{batch} x {length} (ms)" for batch, length in SHAPES)]
    report.show("SST-2 dev", {name: [str(cell) for cell in row] for name, row in rows.items()}, columns)
    report.show_machine(machine)
    report.save(
        arguments.json,
        {"machine": machine, "epochs": arguments.epochs, "pieces": arguments.pieces, "columns": columns, "rows": rows},
    )
    if arguments.plot is not None:
        _plot(arguments.plot, rows)


def _as_csv(source: Path, folder: Path) -> Path:
    """Lines of `label text` as a csv with the columns that onnxpress reads."""
    path = folder / f"{source.name}.csv"
    pairs = [line.split(" ", 1) for line in source.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows((text.strip(), label) for label, text in pairs)
    return path


def _built(name: str, arguments: argparse.Namespace, train: Path, dev: Path) -> Artifact:
    folder = arguments.out / name.replace(" ", "-").replace("%", "").replace(",", "")
    if (folder / "manifest.json").is_file():
        return Artifact.open(folder)
    prune = SIZES[name]
    distil = {
        "file": str(train),
        "epochs": arguments.epochs,
        "pieces": arguments.pieces,
        "learning_rate": arguments.learning_rate,
    }
    more: dict[str, Any] = {"prune": prune, "distil": distil} if prune else {}
    return onnxpress.build(
        arguments.model,
        out=folder,
        task="text-classification",
        precision="int8",
        file=str(dev),
        calibration=str(train),
        keep_all=True,
        measure=False,
        quiet=False,
        **more,
    )


def _measured(built: dict[str, Artifact], model: Path, rounds: int) -> dict[str, list[float]]:
    """Accuracy, megabytes and milliseconds of each, the systems taking turns."""
    original = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    sessions = {name: onnxpress.load(artifact.path).session for name, artifact in built.items()}
    first = next(iter(built.values()))
    export = first.manifest.ledger[0]
    rows = {"PyTorch fp32": [round(export["quality"], 2), round(export["bytes"] / 1e6, 1)]}
    for name, artifact in built.items():
        size = sum(entry.size for file, entry in artifact.manifest.files.items() if file.startswith("model.onnx"))
        rows[name] = [round(artifact.manifest.ledger[-1]["quality"], 2), round(size / 1e6, 1)]
    for batch, length in SHAPES:
        feeds = random_tokens(first.manifest.signature, batch, length)
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}

        def answer(tensors: dict[str, torch.Tensor] = tensors) -> None:
            with torch.inference_mode():
                original(**tensors)

        tasks: dict[str, Any] = {"PyTorch fp32": answer}
        tasks |= {name: partial(session.run, feeds) for name, session in sessions.items()}
        for name, milliseconds in alternate(tasks, rounds=rounds, seconds=0.3).items():
            rows[name].append(round(milliseconds, 2))
    return rows


def _plot(path: Path, rows: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, row in sorted(rows.items(), key=lambda item: item[1][2]):
        axes.plot(row[2], row[0], "o", label=name)
    axes.legend(fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.margins(x=0.1, y=0.1)
    axes.set_xlabel(f"milliseconds, batch {SHAPES[0][0]}, {SHAPES[0][1]} tokens")
    axes.set_ylabel("SST-2 dev accuracy, %")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
