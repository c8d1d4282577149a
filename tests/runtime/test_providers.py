"""Providers are asked for exactly; what does not load is named, on this machine's real wheels."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_artifacts import SIGNATURE, save_embedder

from onnxpress.errors import ProviderError
from onnxpress.manifest import Signature, TensorSpec
from onnxpress.runtime import CPU, CUDA, Session, TensorRT
from onnxpress.runtime.providers import make_providers


def test_names_become_options() -> None:
    assert make_providers(["tensorrt", "cuda", "cpu"]) == (TensorRT(), CUDA(), CPU())
    assert make_providers([CPU(threads=3)]) == (CPU(threads=3),)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["gpu"], "Unknown provider 'gpu'; the providers are: cpu, cuda, tensorrt"),
        (["CUDAExecutionProvider"], "Unknown provider"),
        (["cpu", "cpu"], "each once"),
        ([], "at least one"),
    ],
)
def test_refuses_unknown_and_repeated(given: list[str], message: str) -> None:
    with pytest.raises(ProviderError, match=message):
        make_providers(given)


def test_refuses_no_threads() -> None:
    with pytest.raises(ProviderError, match="at least one thread"):
        CPU(threads=0)


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_the_cpu_wheel_says_that_it_has_no_gpu_provider(name: str, tmp_path: Path) -> None:
    path = save_embedder(tmp_path / "model.onnx")
    with pytest.raises(ProviderError, match=rf"{name} .* not in the installed wheel .*onnxpress\[gpu\]"):
        Session(path, providers=[name])


def test_fallback_is_said(tmp_path: Path) -> None:
    path = save_embedder(tmp_path / "model.onnx")
    session = Session(path, providers=["cuda", "cpu"], allow_fallback=True)
    assert session.providers == ("cpu",)
    assert "cuda was asked for" in session.fallback_note
    session = Session(path, providers=["tensorrt"], allow_fallback=True)
    assert session.providers == ("cpu",)
    assert "tensorrt was asked for" in session.fallback_note


def test_cuda_options() -> None:
    assert CUDA(device_id=1, memory_limit=2**30).options(SIGNATURE, "key") == {
        "device_id": "1",
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "gpu_mem_limit": str(2**30),
    }
    assert CUDA(tf32=True).options(None, "")["use_tf32"] == "1"


def test_tensorrt_profiles_cover_the_signature(tmp_path: Path) -> None:
    options = TensorRT(cache_folder=tmp_path).options(SIGNATURE, "abc")
    assert options["trt_profile_min_shapes"] == "input_ids:1x1,attention_mask:1x1"
    assert options["trt_profile_opt_shapes"] == "input_ids:64x16,attention_mask:64x16"
    assert options["trt_profile_max_shapes"] == "input_ids:64x16,attention_mask:64x16"
    folder = tmp_path / "abc" / f"onnxruntime-{importlib.metadata.version('onnxruntime')}"
    assert folder.is_dir()
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(folder)
    assert not [name for name in options if "fp16" in name or "int8" in name]


def test_tensorrt_without_ranges_or_cache() -> None:
    unknown = Signature(
        task="module", inputs=(TensorSpec(name="x", dtype="float32", shape=("n", "m")),), outputs=(), axes={"n": (1, 2)}
    )
    for signature in (None, unknown):
        assert TensorRT().options(signature, "") == {
            "device_id": "0",
            "trt_builder_optimization_level": "3",
            "trt_sparsity_enable": "1",
        }


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProviderError, match=r"cache .* cannot be made"):
        TensorRT(cache_folder=tmp_path / "file").options(SIGNATURE, "abc")


SHADOW = """
import sys
sys.path.insert(0, {folder!r})
from onnxpress.errors import OnnxpressError
from onnxpress.runtime.providers import check_provider
try:
    check_provider("cpu")
except OnnxpressError as error:
    print(type(error).__name__, error)
"""


def shadowed(folder: Path) -> str:
    """What a fresh process says that sees `folder` before the installed packages."""
    done = subprocess.run(
        [sys.executable, "-c", SHADOW.format(folder=str(folder))], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_two_wheels_at_once_are_refused(tmp_path: Path) -> None:
    """The metadata of a second wheel, as pip leaves it."""
    info = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n")
    said = shadowed(tmp_path)
    assert said.startswith("ProviderError Both onnxruntime and onnxruntime-gpu are installed")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in said


def test_a_half_removed_wheel_is_named(tmp_path: Path) -> None:
    """Uninstalling one of the two wheels leaves a package without its content."""
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("")
    assert shadowed(tmp_path).startswith("ProviderError ONNX Runtime is installed and does not load")
