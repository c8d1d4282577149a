"""The wheel in a fresh environment: with onnxpress[cpu] alone it answers; with onnxpress[gpu] it says what is missing.

These tests fetch packages from the package index.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from tiny_artifacts import save_artifact

from onnxpress.runtime import Embedder, load

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("onnxpress", "exporters", "optimizers", "runtime")
PLAIN = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the working tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in PLAIN:
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((copy / "dist").glob("*.whl"))


class Environment:
    """A fresh virtual environment with the wheel and one extra."""

    def __init__(self, folder: Path, wheel: Path, extra: str) -> None:
        venv.create(folder, with_pip=True)
        self.binaries = folder / "bin"
        done = self.run("python", "-m", "pip", "install", "--quiet", f"onnxpress[{extra}] @ {wheel.as_uri()}")
        assert done.returncode == 0, done.stderr

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [str(self.binaries / program), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=clean, cwd=self.binaries)


@pytest.mark.venv
def test_the_cpu_extra_alone_runs_an_artifact(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", wheel, "cpu")
    installed = json.loads(environment.run("python", "-m", "pip", "list", "--format", "json").stdout)
    names = {package["name"].lower() for package in installed}
    assert {"onnxpress", "onnxruntime", "tokenizers"} <= names
    assert not names & {"torch", "transformers", "onnx", "onnx-ir", "onnxscript", "safetensors", "pydantic", "rich"}

    artifact = save_artifact(tmp_path / "tiny")
    texts = ["the cat sat on a mat", "a red dog"]
    done = environment.run("onnxpress", "run", str(artifact.path), "--json", "--text", texts[0], "--text", texts[1])
    assert done.returncode == 0, done.stderr
    here = load(artifact.path)
    assert isinstance(here, Embedder)
    np.testing.assert_allclose(json.loads(done.stdout)["answers"], here.embed(texts), rtol=0, atol=1e-6)
    script = (
        "import sys, numpy, onnxpress\n"
        "runner = onnxpress.load(sys.argv[1])\n"
        "numpy.save(sys.argv[2], runner.embed(sys.argv[3:]))\n"
    )
    done = environment.run("python", "-W", "error", "-c", script, str(artifact.path), str(tmp_path / "out.npy"), *texts)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), here.embed(texts), rtol=0, atol=1e-6)
    done = environment.run("onnxpress", "verify", str(artifact.path))
    assert done.returncode == 0, done.stdout + done.stderr

    done = environment.run("onnxpress", "run", str(artifact.path), "--provider", "cuda", "--text", "the cat")
    assert done.returncode == 2
    assert "not in the installed wheel (onnxruntime)" in done.stderr
    assert "onnxpress[gpu]" in done.stderr
    assert "Traceback" not in done.stderr


ASK = """
import sys
from onnxpress.errors import ProviderError
from onnxpress.runtime import TensorRT, load
for name in ("cuda", "tensorrt", "tensorrt-rtx", TensorRT(raw_options={"trt_foo": "1"})):
    try:
        load(sys.argv[1], providers=[name])
    except ProviderError as error:
        assert "\\n" not in str(error)
        print(name, error)
fallen = load(sys.argv[1], providers=["tensorrt", "cuda", "cpu"], allow_fallback=True)
assert fallen.session.providers == ("cpu",), fallen.session.providers
assert "cuda was asked for" in fallen.session.fallback_note
assert "tensorrt was asked for" in fallen.session.fallback_note
assert fallen.embed(["the cat"]).shape[0] == 1
print("cpu", load(sys.argv[1]).session.providers)
"""


@pytest.mark.venv
def test_the_gpu_extra_names_the_library_that_is_missing(wheel: Path, tmp_path: Path) -> None:
    """On a machine without CUDA's libraries; where there is a driver, the fresh environment still has none of them."""
    environment = Environment(tmp_path / "venv", wheel, "gpu")
    artifact = save_artifact(tmp_path / "tiny")
    done = environment.run("python", "-c", ASK, str(artifact.path))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    cuda, tensorrt, rtx, unknown, cpu = done.stdout.splitlines()
    assert cuda.startswith("cuda The provider cuda was asked for and does not load: lib")
    assert tensorrt.startswith("tensorrt The provider tensorrt was asked for and does not load: lib")
    for said, libraries in (
        (cuda, ("cublasLt", "cublas", "curand")),
        (tensorrt, ("nvinfer", "nvonnxparser", "cudnn")),
    ):
        missing, _, remedy = said.partition(" cannot be found. ")
        assert all(f"lib{library}.so" in missing for library in libraries), said
        assert "onnxruntime-gpu[cuda,cudnn]" in remedy
    assert "TensorRT 10 from NVIDIA" in tensorrt
    assert rtx.startswith("tensorrt-rtx The provider tensorrt-rtx was asked for and its package is not installed")
    assert "trt_foo, which this ONNX Runtime does not know; it knows trt_auxiliary_streams" in unknown
    assert cpu == "cpu ('cpu',)"

    done = environment.run("onnxpress", "run", str(artifact.path), "--provider", "cuda", "--text", "the cat")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "cannot be found. Install" in done.stderr
    assert "Traceback" not in done.stderr
