"""A network of images as a file of the cache, or an artifact: `file:NAME` on ONNX Runtime, `openvino:fp32` or `openvino:int8`, `ours:…`.

int8 of OpenVINO is NNCF's post-training quantization of the float file, calibrated on the same images as ours. OpenVINO reads a file of
the batch's own shape (what is not int8 as it likes, in bfloat16 too), with the latency hint, and for several images with a stream a core too; the fastest counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import THREADS, Setting, fastest

FLOAT = "float.onnx"
IMAGES = "calibration.npz"
NAME = "image"


def images(batch: int, size: int, seed: int = 0) -> np.ndarray:
    """The same random images for everybody, float32 (batch, 3, size, size), of unequal colours and contrast."""
    random = np.random.default_rng(seed)
    colours, contrast = random.uniform(-2, 2, (batch, 3, 1, 1)), random.uniform(0.2, 1, (batch, 1, 1, 1))
    return (colours + contrast * random.standard_normal((batch, 3, size, size))).astype(np.float32)


def open_peer(variant: str, setting: Setting) -> File | OpenVino | Ours:
    kind, _, form = variant.partition(":")
    if kind == "ours":
        return Ours(setting.artifact)
    return File(setting.cache / form) if kind == "file" else OpenVino(form, setting.cache)


class File:
    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = THREADS, 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.description = f"onnxruntime {onnxruntime.__version__}"

    def shape(self, batch: int, size: int) -> tuple[Callable[[], Any], str]:
        feeds = {NAME: images(batch, size)}
        return lambda: self.session.run(None, feeds), ""


class Ours:
    """artifact: for any batch; or a folder with one for each, named by its size."""

    def __init__(self, artifact: Path) -> None:
        import onnxpress

        folders = [path for path in artifact.iterdir() if path.name.isdigit()]
        self.runners: dict[int, Any] = {int(path.name): onnxpress.load(path) for path in folders}
        self.any_batch: Any = None if folders else onnxpress.load(artifact)
        self.description = f"onnxpress {onnxpress.__version__}"

    def shape(self, batch: int, size: int) -> tuple[Callable[[], Any], str]:
        feeds, runner = {NAME: images(batch, size)}, self.runners.get(batch, self.any_batch)
        return lambda: runner.run(feeds), ""


class OpenVino:
    def __init__(self, form: str, cache: Path) -> None:
        import openvino

        self.core = openvino.Core()
        self.model = self.core.read_model(cache / FLOAT)
        self.options: dict[str, Any] = {"INFERENCE_NUM_THREADS": THREADS}
        if form == "fp32":
            self.options["INFERENCE_PRECISION_HINT"] = "f32"  # else bfloat16 where there is some
        if form == "int8":
            import nncf

            with np.load(cache / IMAGES) as file:
                array = file[NAME]
            calibration = nncf.Dataset([array[index : index + 1] for index in range(len(array))])
            self.model = nncf.quantize(self.model, calibration, subset_size=len(array))
        self.description = f"openvino {openvino.__version__.split('-')[0]}"

    def shape(self, batch: int, size: int) -> tuple[Callable[[], Any], str]:
        import openvino

        array = images(batch, size)

        def compiled(rows: int, options: dict[str, Any]) -> Any:
            self.model.reshape([rows, 3, size, size])
            return self.core.compile_model(self.model, "CPU", {**self.options, **options})

        request = compiled(batch, {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
        calls: dict[str, Callable[[], Any]] = {
            "latency": lambda: request.infer([array], share_inputs=True, share_outputs=True)
        }
        if batch > 1:
            streams = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": THREADS}
            queue = openvino.AsyncInferQueue(compiled(1, streams), THREADS)

            def one_by_one() -> None:
                for index in range(batch):
                    queue.start_async([array[index : index + 1]], share_inputs=True)
                queue.wait_all()

            calls["throughput"] = one_by_one
        setting = fastest(calls)
        return calls[setting], setting
