"""int8 of convolution networks side by side: onnxpress against onnxruntime's own quantize_static, accuracy and latency.

    python benchmarks/convolution.py [--rounds 7] [--batch 1 32] [--json FILE] [--data FOLDER]

Trains a small residual network with batch normalization on scikit-learn's digits (seeded; 1,797 images of 8x8, a third held out) and
builds it at fp32 and int8-qdq. onnxruntime quantizes the same export after its own quant_pre_process, in the forms that its
documentation advises for x86: QDQ, per channel, unsigned activations, weights signed with reduce_range or unsigned, min-max and
entropy; all calibrate on the same 128 images. --data FOLDER: the network of model_vision_small/mnist.onnx too (no labels:
agreement with the float file on random strokes). Super-resolution is left out: its file needs onnxruntime-extensions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import onnx
import onnx.version_converter
import onnxruntime
import report
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from sklearn.datasets import load_digits

import onnxpress

CALIBRATION = 128
PER_CHANNEL = 13  # the opset from which weights can have a scale for each channel
Arrays = dict[str, np.ndarray]


class Block(torch.nn.Module):
    """Two convolutions, each with batch normalization, and what they read added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = torch.nn.ModuleList([torch.nn.BatchNorm2d(channels) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(x + self.norms[1](self.second(y)))


class Network(torch.nn.Module):
    """About 280,000 parameters: 32 channels at 16x16, 64 at 8x8, means, ten classes. Takes (batch, 1, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(1, 32, 3, padding=1, bias=False), torch.nn.BatchNorm2d(32), torch.nn.ReLU()
        )
        self.one = torch.nn.Sequential(Block(32), Block(32))
        self.down = torch.nn.Sequential(
            torch.nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), torch.nn.BatchNorm2d(64), torch.nn.ReLU()
        )
        self.two = torch.nn.Sequential(Block(64), Block(64), Block(64))
        self.head = torch.nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.two(self.down(self.one(self.stem(image))))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """What quantize_static calibrates on."""

    def __init__(self, samples: Arrays) -> None:
        self._left: Iterator[Arrays] = (
            {name: array[index : index + 1] for name, array in samples.items()}
            for index in range(len(next(iter(samples.values()))))
        )

    def get_next(self) -> Arrays | None:
        return next(self._left, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--data", type=Path, help="folder with model_vision_small/")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    machine = report.facts()
    figures: dict[str, Any] = {"machine": machine, "threads": measure.THREADS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, train, test = trained(arguments.epochs)
        figures["digits"] = compare("digits", folder / "digits", model, train, test, arguments)
        if arguments.data is not None:
            path = arguments.data / "model_vision_small" / "mnist.onnx"
            inputs = {"Input3": strokes(CALIBRATION + 256)}
            part = [{name: array[begin:end] for name, array in inputs.items()} for begin, end in ((0, 128), (128, 384))]
            figures["mnist.onnx"] = compare("mnist.onnx", folder / "mnist", path, *part, arguments)
    report.show_machine(machine)
    report.save(arguments.json, figures)


def trained(epochs: int) -> tuple[torch.nn.Module, Arrays, Arrays]:
    """The network, its training samples and the others; images of the digits at twice their size, values 0 to 1."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, first = np.unique(images.astype(np.float32), axis=0, return_index=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order].reshape(-1, 1, 8, 8) / 16, labels[first][order].astype(np.int64)
    images = np.kron(images, np.ones((2, 2), np.float32))
    test = len(images) // 3
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    given, wanted = torch.from_numpy(images[test:]), torch.from_numpy(labels[test:])
    for _ in range(epochs):
        for part in torch.randperm(len(given)).split(64):
            loss = torch.nn.functional.cross_entropy(model(given[part]), wanted[part])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval(), {"image": images[test:]}, {"image": images[:test], "labels": labels[:test]}


def strokes(count: int) -> np.ndarray:
    """Random thick lines on black, (count, 1, 28, 28), 0 to 255."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:28, :28]
    images = np.zeros((count, 28, 28), np.float32)
    for image in images:
        for _ in range(3):
            (y0, x0), (y1, x1) = random.uniform(4, 24, (2, 2))
            along = np.clip(
                ((y - y0) * (y1 - y0) + (x - x0) * (x1 - x0)) / ((y1 - y0) ** 2 + (x1 - x0) ** 2 + 1e-6), 0, 1
            )
            distance = np.hypot(y - y0 - along * (y1 - y0), x - x0 - along * (x1 - x0))
            image[:] = np.maximum(image, 255 * np.clip(2 - distance, 0, 1))
    return images[:, None]


def compare(
    title: str, folder: Path, source: Any, train: Arrays, test: Arrays, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Build all forms, show them in a table, and give the figures."""
    folder.mkdir()
    labels = test.pop("labels", None)
    train = {name: array[:CALIBRATION] for name, array in train.items()}
    np.savez(folder / "train.npz", **train)
    np.savez(folder / "test.npz", **test, **({} if labels is None else {"labels": labels}))
    options: dict[str, Any] = {"measure": False, "quiet": True}
    if isinstance(source, torch.nn.Module):
        options["example_inputs"] = {name: torch.from_numpy(array[:2]) for name, array in train.items()}
    options["file"] = str(folder / "test.npz")
    sessions: dict[str, Any] = {}
    for name, precision, passes in (
        ("onnxpress fp32", "fp32", {}),
        ("onnxpress int8-qdq", "int8-qdq", {}),
        ("onnxpress int8-qdq, entropy, corrected", "int8-qdq", {"calibration": "entropy", "bias_correction": True}),
    ):
        out = folder / name.replace(" ", "-").replace(",", "")
        built: dict[str, Any] = {"passes": {"int8-qdq": passes}} if passes else {}
        if precision != "fp32":
            built["calibration"] = str(folder / "train.npz")
        artifact = onnxpress.build(source, out=out, precision=precision, **built, **options)
        sessions[name] = onnxpress.load(artifact.path)
    plain = folder / "onnxpress-fp32" / "model.onnx"
    rows = {
        "ONNX Runtime fp32": plain,
        **quantized(title, plain, folder, train),
    }
    for name, path in rows.items():
        sessions[name] = opened(path)
    expected = answers(sessions["ONNX Runtime fp32"], test)
    found: dict[str, Any] = {}
    for name, session in sessions.items():
        scores = answers(session, test)
        found[name] = {
            "accuracy": None if labels is None else 100 * float((scores.argmax(1) == labels).mean()),
            "agreement": 100 * float((scores.argmax(1) == expected.argmax(1)).mean()),
            "variance_kept": 1 - float(((scores - expected) ** 2).sum() / ((expected - expected.mean(0)) ** 2).sum()),
        }
    usable = [batch for batch in arguments.batch if can_take(sessions["ONNX Runtime fp32"], test, batch)]
    for batch in usable:
        for name, times in in_turns(sessions, test, batch, arguments.rounds).items():
            found[name][f"ms_{batch}"] = times
    show(title, found, usable)
    return found


def quantized(title: str, plain: Path, folder: Path, calibration: Arrays) -> dict[str, Path]:
    """quantize_static's forms, those that work."""
    ready = folder / "ready.onnx"
    model = onnx.load(plain)
    if model.opset_import[0].version < PER_CHANNEL:
        model = onnx.version_converter.convert_version(model, PER_CHANNEL)
    quant_pre_process(model, str(ready))
    method, kinds = quantization.CalibrationMethod, quantization.QuantType
    rows = {}
    for name, weights, reduce_range, calibrate in (
        ("quantize_static U8S8, 7 bits", kinds.QInt8, True, method.MinMax),
        ("quantize_static U8U8", kinds.QUInt8, False, method.MinMax),
        ("quantize_static U8U8, entropy", kinds.QUInt8, False, method.Entropy),
    ):
        path = folder / (name.replace(" ", "-").replace(",", "") + ".onnx")
        try:
            quantization.quantize_static(
                str(ready),
                str(path),
                Reader(calibration),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=kinds.QUInt8,
                weight_type=weights,
                calibrate_method=calibrate,
            )
        except ValueError as error:  # of onnxruntime 1.32, for mnist.onnx's biases
            print(f"{title}: {name} fails: {error}", file=sys.stderr)
            continue
        rows[name] = path
    return rows


def opened(path: Path) -> Any:
    """A plain ONNX Runtime session with `run` as ours has it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = measure.THREADS
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    class Plain:
        def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return Plain()


def answers(session: Any, samples: Arrays) -> np.ndarray:
    """The first output for every sample, one call each."""
    count = len(next(iter(samples.values())))
    calls = [{name: array[index : index + 1] for name, array in samples.items()} for index in range(count)]
    return np.concatenate([next(iter(session.run(feeds).values())) for feeds in calls])


def can_take(session: Any, samples: Arrays, batch: int) -> bool:
    """Whether a graph takes a batch; old files have fixed ones."""
    try:
        session.run({name: array[:batch] for name, array in samples.items()})
    except Exception as error:  # onnxruntime's errors have no common base that it exports
        print(f"batch {batch} left out: {str(error).splitlines()[0][:100]}")
        return False
    return True


def in_turns(sessions: Mapping[str, Any], samples: Arrays, batch: int, rounds: int) -> dict[str, list[float]]:
    """Each session's median milliseconds in each round; another one begins each time."""
    feeds = {name: array[:batch] for name, array in samples.items()}
    names = list(sessions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(statistics.median(measure.milliseconds(partial(sessions[name].run, feeds), 50)))
    return times


def show(title: str, found: Mapping[str, Mapping[str, Any]], batches: list[int]) -> None:
    columns = ["accuracy", "same choice as fp32", "variance kept", *(f"ms at batch {batch}" for batch in batches)]
    rows = {
        name: [
            "" if row["accuracy"] is None else f"{row['accuracy']:.2f}",
            f"{row['agreement']:.2f}",
            f"{row['variance_kept']:.5f}",
            *(report.spread(row[f"ms_{batch}"]) for batch in batches),
        ]
        for name, row in found.items()
    }
    report.show(title, rows, columns)


if __name__ == "__main__":
    onnxruntime.set_default_logger_severity(3)
    main()
