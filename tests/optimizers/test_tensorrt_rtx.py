"""NVIDIA's own parser and builder take what int8-qdq and fp8-qdq write, and whole artifacts for tensorrt and cuda, and refuse the
CPU's form. No GPU is needed.

Needs the extra tensorrt-check (a wheel of 95 MB): pip install 'onnxpress[tensorrt-check]'; pytest -rs says where it was skipped.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
import transformers as tf
from calibrating import calibrated
from quantizable import images, normed, residual, vectors
from tiny_models import save_model

import onnxpress
from onnxpress.graph import Graph
from onnxpress.optimizers import make_pass
from onnxpress.runtime import TensorRT

pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx_bindings") is None,
        reason="NVIDIA's TensorRT-RTX builder is not installed: graphs for cuda and tensorrt are not checked against it",
    ),
]
AXES = {"batch": (1, 8, 16)}
COMPUTE_CAPABILITY = "SM89"  # Ada, the first with FP8


def engine_bytes(graph: Graph, feeds: dict[str, Any]) -> int:
    """Size of the engine that is built for the feeds' shapes. Raises ValueError."""
    return built(
        ir.to_proto(graph.model).SerializeToString(), {name: [array.shape] * 3 for name, array in feeds.items()}
    )


def built(model: bytes, shapes: Mapping[str, Sequence[tuple[int, ...]]]) -> int:
    """Size of the engine that is built for (smallest, typical, largest) shapes of each input. Raises ValueError with what the
    parser or the builder says."""
    import tensorrt_rtx_libs  # noqa: F401  loads the libraries that the bindings need
    from tensorrt_rtx_bindings import tensorrt_rtx as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.messages.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        raise ValueError("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, COMPUTE_CAPABILITY), 0)
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *shapes[tensor.name])
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ValueError("; ".join(log.messages))
    return int(engine.nbytes)


@pytest.mark.parametrize("name", ["int8-qdq", "fp8-qdq"])
@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("options", [{}, {"bias_correction": True, "calibration": "entropy"}])
def test_a_convolution_network_builds(name: str, opset: int, options: dict[str, Any], tmp_path: Path) -> None:
    context = calibrated(images(16), tmp_path, kind="tensorrt")
    result = make_pass(name, options).apply(residual(opset), context)
    assert result.changes == 5  # 4 layers and a sum
    assert engine_bytes(result.graph, images(1)[0]) > 10_000


@pytest.mark.parametrize("name", ["int8-qdq", "fp8-qdq"])
def test_linear_layers_build(name: str, tmp_path: Path) -> None:
    context = calibrated(vectors(8, seed=0), tmp_path, kind="cuda")
    result = make_pass(name, {"smooth": 0.5}).apply(normed(), context)
    assert result.changes == 3
    assert engine_bytes(result.graph, vectors(1, seed=0)[0]) > 10_000


def profile(options: Mapping[str, str]) -> dict[str, list[tuple[int, ...]]]:
    """(smallest, typical, largest) shapes of each input, as ONNX Runtime is told them."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for kind in ("min", "opt", "max"):
        for part in options[f"trt_profile_{kind}_shapes"].split(","):
            name, sizes = part.split(":")
            shapes.setdefault(name, []).append(tuple(map(int, sizes.split("x"))))
    return shapes


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.LayerNorm(64), torch.nn.Linear(64, 32))
    return torch.nn.Sequential(*layers).eval()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8-qdq", "fp8-qdq"])
@pytest.mark.parametrize("target", ["tensorrt", "cuda"])
def test_an_artifact_builds_with_the_profile_of_its_signature(target: str, precision: str, tmp_path: Path) -> None:
    """Through the options that ONNX Runtime is given. A graph for CUDA parses where no operator of com.microsoft is in it."""
    example = (torch.randn(4, 32),)
    artifact = onnxpress.build(
        network(), example_inputs=example, target=target, precision=precision, out=tmp_path / "artifact"
    )
    shapes = profile(TensorRT(axes=AXES).options(artifact.manifest.signature, ""))
    assert [shape[0] for [*one] in shapes.values() for shape in one] == [1, 8, 16]
    model = onnx.load(artifact.path / "model.onnx")
    types = onnx.TensorProto
    wanted = {"fp16": None, "bf16": types.BFLOAT16, "int8-qdq": types.INT8, "fp8-qdq": types.FLOAT8E4M3FN}[precision]
    assert wanted is None or wanted in {one.data_type for one in model.graph.initializer}
    assert built(model.SerializeToString(), shapes) > 10_000


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "int8-qdq", "fp8-qdq"])
def test_a_text_encoder_builds(precision: str, tmp_path: Path) -> None:
    """As one operator its attention, of float32 and of small heads, would be refused."""
    folder = save_model(tmp_path / "bert", "bert", tf.AutoModelForSequenceClassification, num_labels=3)
    artifact = onnxpress.build(
        folder, target="tensorrt", precision=precision, keep_all=True, samples=8, out=tmp_path / "artifact"
    )
    model = (artifact.path / "model.onnx").read_bytes()
    assert built(model, profile(TensorRT().options(artifact.manifest.signature, ""))) > 10_000


@pytest.mark.parametrize("kind", ["cpu", "cpu-avx2", "cpu-arm64"])
def test_the_form_for_the_cpu_is_refused(kind: str, tmp_path: Path) -> None:
    """So that the tests above can fail."""
    result = make_pass("int8-qdq").apply(residual(), calibrated(images(8), tmp_path, kind=kind))
    with pytest.raises(ValueError, match=r"zero point|Int32|UINT8"):
        engine_bytes(result.graph, images(1)[0])
