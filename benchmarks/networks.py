"""int8 of well-known networks of images side by side: onnxpress, onnxruntime's quantize_static and OpenVINO, milliseconds.

    python benchmarks/networks.py [--only resnet50 pp-lcnet …] [--batch 1 8] [--rounds 5] [--systems openvino …] [--json FILE]

The networks are transformers' with random weights and the statistics of random images: speed does not hang on weights, accuracy does,
so that nothing is said of it here (convolution.py does, of trained ones). Each is built at fp32 and int8-qdq; the others get the fp32
artifact's graph, in which convolutions hold their batch norms already, and the same 16 images to calibrate on. quantize_static writes
U8S8, per channel, after quant_pre_process; with `reduce_range` where the CPU's products overflow without.

Where a machine is shared, medians may be its neighbours': on virtual Xeons with AMX, calls of every system took either the fastest time or twice
that, for seconds at a time. So the fastest call of all rounds is shown as well.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import report
import torch
import transformers
import turns
from convolution import Reader
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from peers.images import FLOAT, IMAGES, NAME, images
from turns import System

import onnxpress
from onnxpress.runtime.saturation import products_saturate

CALIBRATION, SIZE, STATIC = 16, 224, "static.onnx"

Rounds = dict[str, list[float]]  # "median_ms" and "min_ms" of each round's calls


class Scores(torch.nn.Module):
    """A transformers classifier that answers its logits, or what the last layer gives, alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        answer = self.model(pixel_values=image)
        return answer.logits if "logits" in answer else answer.last_hidden_state


def network(name: str, **config: Any) -> Callable[[], torch.nn.Module]:
    """A factory of ForImageClassification with 1,000 classes."""

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        settings = getattr(transformers, f"{name}Config")(num_labels=1000, **config)
        return Scores(getattr(transformers, f"{name}ForImageClassification")(settings))

    return make


NETWORKS = {
    "resnet50": network("ResNet"),
    "mobilenet-v2": network("MobileNetV2"),
    "pp-lcnet": network("PPLCNet"),
    "regnet-y-002": network("RegNet", depths=[1, 1, 4, 7], hidden_sizes=[24, 56, 152, 368], groups_width=8),
    "hgnet-v2": network("HGNetV2"),
    "convnext-v2-atto": network("ConvNextV2", hidden_sizes=[40, 80, 160, 320], depths=[2, 2, 6, 2]),
    "swiftformer-xs": network("SwiftFormer"),
    "poolformer-s12": network("PoolFormer"),
    "dinov2-small": network("Dinov2", hidden_size=384, num_attention_heads=6),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="systems whose names contain one of these")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    machine = report.facts()
    figures: dict[str, Any] = {"machine": machine}
    rows: dict[str, list[str]] = {}
    quickest: dict[str, list[str]] = {}
    columns: list[str] = []
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            times = measured(NETWORKS[name](), Path(folder), arguments)
        figures[name] = times
        columns = list(times)
        for batch in map(str, arguments.batch):
            found = [systems[batch] for systems in times.values()]
            rows[f"{name}, {batch}"] = [report.spread(rounds["median_ms"]) for rounds in found]
            quickest[f"{name}, {batch}"] = [f"{min(rounds['min_ms']):.4g}" for rounds in found]
    report.show("milliseconds of network, batch", rows, columns)
    report.show("the same, the fastest call of all", quickest, columns)
    report.show_machine(machine)
    report.save(arguments.json, figures)


def measured(model: torch.nn.Module, folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, Rounds]]:
    """Milliseconds of each round, by system and batch."""
    calibrate(model)
    array = images(CALIBRATION, SIZE, seed=1)
    np.savez(folder / IMAGES, **{NAME: array})
    np.savez(folder / "test.npz", **{NAME: images(CALIBRATION, SIZE, seed=3)})
    example = {NAME: torch.from_numpy(images(2, SIZE))}
    options: dict[str, Any] = {"example_inputs": example, "measure": False, "quiet": True}
    options["file"] = str(folder / "test.npz")
    plain = onnxpress.build(model, out=folder / "fp32", precision="fp32", **options).path
    pressed = onnxpress.build(
        model,
        out=folder / "int8",
        precision="int8-qdq",
        calibration=str(folder / IMAGES),
        budget="100%",  # of random weights
        **options,
    ).path
    for_openvino: dict[str, Any] = {
        **options, "target": "openvino", "precision": "int8-qdq", "calibration": str(folder / IMAGES), "budget": "100%",
    }  # fmt: skip
    compiled = onnxpress.build(model, out=folder / "openvino", **for_openvino).path
    for batch in arguments.batch:
        fixed = {NAME: torch.from_numpy(images(batch, SIZE))}
        onnxpress.build(
            model, out=folder / "fixed" / str(batch), **{**for_openvino, "example_inputs": fixed, "dynamic_axes": {}}
        )
    onnx.save(onnx.load(plain / "model.onnx"), folder / FLOAT)  # weights inside, which the artifact may have beside it
    quant_pre_process(str(folder / FLOAT), str(folder / "ready.onnx"), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(folder / "ready.onnx"),
        str(folder / STATIC),
        Reader({NAME: array}),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=products_saturate(),
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    systems = [
        System(name="ONNX Runtime fp32", environment=None, peer=f"images:file:{FLOAT}"),
        System(name="quantize_static", environment=None, peer=f"images:file:{STATIC}"),
        System(name="OpenVINO fp32", environment="openvino", peer="images:openvino:fp32"),
        System(name="OpenVINO int8 (NNCF)", environment="openvino", peer="images:openvino:int8"),
        System(name="onnxpress fp32", environment=None, peer="images:ours:fp32", artifact=plain),
        System(name="onnxpress int8-qdq", environment=None, peer="images:ours:int8", artifact=pressed),
        System(
            name="onnxpress int8-qdq for openvino", environment=None, peer="images:ours:openvino", artifact=compiled
        ),
        System(
            name="the same, built for one batch", environment=None, peer="images:ours:fixed", artifact=folder / "fixed"
        ),
    ]
    systems = turns.chosen(systems, arguments.systems)
    times: dict[str, dict[str, Rounds]] = {
        system.name: {str(batch): {"median_ms": [], "min_ms": []} for batch in arguments.batch} for system in systems
    }
    with turns.workers(systems, model=folder, cache=folder, calibration=folder / IMAGES) as started:
        for number in range(arguments.rounds):
            for batch in arguments.batch:
                for worker in turns.in_turns(started, number):
                    answer = worker.ask("shape", batch=batch, length=SIZE, repeats=max(4, 24 // batch))
                    for what, rounds in times[worker.name][str(batch)].items():
                        rounds.append(answer[what])
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    for name, found in times.items():
        print(
            name,
            {batch: f"{statistics.median(rounds['median_ms']):.2f}" for batch, rounds in found.items()},
            flush=True,
        )
    return times


def calibrate(model: torch.nn.Module) -> None:
    """Give batch norms the statistics of random images, so that activations have usual sizes."""
    model.eval()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None
            part.train()
    with torch.no_grad():
        model(torch.from_numpy(images(8, SIZE, seed=2)))
    model.eval()


if __name__ == "__main__":
    onnxruntime.set_default_logger_severity(3)
    main()
