"""What a bundle's README says of Python and C++ runs as it stands there."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_artifacts import save_artifact

import onnxpress
from onnxpress import load
from onnxpress.bundle import bundle
from onnxpress.devices import DEVICES
from onnxpress.on_device import check_files, read_description, this_machine

HERE = next(name for name, facts in DEVICES.items() if (facts.system, facts.machine) == this_machine())
HEADERS = Path(__file__).parents[2] / ".devices" / "cpp" / "include"
LIBRARY = next(iter((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundle")
    with tarfile.open(bundle(save_artifact(place / "tiny").path, target=HERE)) as file:
        file.extractall(place, filter="data")
    return place / f"tiny-{HERE}"


def said(folder: Path, language: str) -> str:
    """The README's one block of a language."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return str(block)


def test_python(folder: Path) -> None:
    code = said(folder, "python").replace("FOLDER", str(folder)) + "import onnxpress; print(onnxpress.__file__)\n"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, imported = done.stdout.splitlines()
    expected = load(folder / "model" / HERE).answer_texts(["A text"])
    np.testing.assert_allclose(ast.literal_eval(answer), expected, atol=1e-6)
    assert Path(imported) == folder / "lib" / "onnxpress" / "__init__.py"
    assert check_files(folder, read_description(folder)), "nothing was written into the bundle"


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    """run.cpp, compiled and run by the README's own lines."""
    if LIBRARY is None or not sys.platform.startswith("linux"):
        pytest.skip("the onnxruntime that is installed has no libonnxruntime.so to link with: run.cpp is not tried")
    if not (HEADERS / "onnxruntime_cxx_api.h").is_file() or shutil.which("g++") is None:
        pytest.skip("run.cpp is not compiled: it takes g++, and tests/devices/setup.sh cpp for the headers")
    place = folder.parent / "onnxruntime"
    (place / "lib").mkdir(parents=True)
    (place / "include").symlink_to(HEADERS)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (place / "lib" / name).symlink_to(LIBRARY)
    environment = {**os.environ, "ONNXRUNTIME": str(place)}
    done = subprocess.run(
        ["bash", "-euc", said(folder, "sh")], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "ok   golden pair  embeddings: difference 0 (allowed 1e-06)" in done.stdout
    assert done.stdout.endswith("verdict: good\n")
    return folder.parent / "run"


def run(program: Path, artifact: Path) -> tuple[int, str]:
    environment = {"LD_LIBRARY_PATH": str(program.parent / "onnxruntime" / "lib")}
    done = subprocess.run([program, artifact], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("change", "shown"), [(0.125, "0.125"), (np.nan, "nan")])
def test_cpp_sees_another_answer_than_the_golden_one(change: float, shown: str, program: Path, tmp_path: Path) -> None:
    artifact = save_artifact(tmp_path / "tiny").path
    tensors = load_file(artifact / "golden.safetensors")
    tensors["output.pair.embeddings"][1, 2] += change
    save_file(tensors, artifact / "golden.safetensors")
    code, output = run(program, artifact)
    assert code == 1
    assert f"BAD  golden pair  embeddings: difference {shown}" in output
    assert output.endswith("verdict: NOT GOOD\n")


class Masks(torch.nn.Module):
    """Masked logits, classes, and truths."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        masked = x.masked_fill(torch.arange(5) > 3, float("-inf"))
        lowest = x.masked_fill(torch.arange(5) > 3, -1e9)
        return masked, masked.argmax(1), (masked > 0), masked.argsort(1).to(torch.int16), lowest


def test_masked_logits_and_integers(program: Path, tmp_path: Path) -> None:
    """An infinity is like itself, and like a mask; of integers the share that differs counts. As Python has it, and C++ too."""
    example = torch.arange(10.0).reshape(2, 5) - 3
    artifact = onnxpress.build(Masks(), example_inputs=example, out=tmp_path / "masks", precision="fp32").path
    options = json.loads((artifact / "manifest.json").read_text())["options"]
    tolerances, sizes = options["golden_tolerance"], options["golden_size"]
    assert list(sizes) == ["output_4"]
    assert tolerances["output_1"] == 1e-3
    assert tolerances["output_4"] < 0.1
    assert np.isfinite(list(tolerances.values())).all()
    code, output = run(program, artifact)
    assert (code, output.count("difference 0 (")) == (0, output.count("difference")), output
    tensors = load_file(artifact / "golden.safetensors")
    tensors["output.first.output_0"][:, 0] = np.inf
    tensors["output.first.output_4"][:, 4] /= 2
    tensors["output.first.output_1"][0] += 1
    tensors["output.first.output_3"][0, 0] += 1
    save_file(tensors, artifact / "golden.safetensors")
    code, output = run(program, artifact)
    rows = tensors["output.first.output_1"].size
    assert code == 1
    assert "BAD  golden first  output_0: difference inf" in output
    assert f"BAD  golden first  output_4: difference {sizes['output_4']:g}" in output, "as large a share of it"
    assert f"BAD  golden first  output_1: difference {1 / rows:g}" in output
    assert "ok   golden first  output_2: difference 0 " in output
    assert f"BAD  golden first  output_3: difference {1 / (5 * rows):g}" in output


def test_cpp_refuses_what_it_cannot_read(program: Path, tmp_path: Path) -> None:
    artifact = save_artifact(tmp_path / "tiny").path
    golden = artifact / "golden.safetensors"
    content = golden.read_bytes()
    for broken in (
        b"",
        content[:7],
        content[:40],
        content[:-1],
        b"\xff" * 8 + content[8:],
        content.replace(b"F32", b"X32"),
    ):
        golden.write_bytes(broken)
        code, output = run(program, artifact)
        assert (code, "verdict" in output) == (2, False), output
        assert output.strip()
    (artifact / "manifest.json").write_text("[1")
    assert run(program, artifact)[0] == 2
    code, output = run(program, tmp_path / "nothing")
    assert (code, output) == (2, f"{tmp_path / 'nothing' / 'manifest.json'} cannot be read\n")


def test_cpp_reads_the_form_for_android_too(program: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(bundle(save_artifact(tmp_path / "tiny").path, target="android-arm64")) as file:
        file.extractall(tmp_path)
    folder = tmp_path / "tiny-android-arm64"
    assert (folder / "run.cpp").read_bytes() == (Path(onnxpress.__file__).parent / "on_device.cpp").read_bytes()
    code, output = run(program, folder / "model" / "android-arm64")
    assert (code, output.endswith("verdict: good\n")) == (0, True), output


def test_no_cpp_where_it_could_not_open_the_model(tmp_path: Path) -> None:
    nvidia = save_artifact(tmp_path / "nvidia", target="tensorrt", precision="fp16").path
    secret = {"encrypt_with": bytes(range(32))}
    for artifact, target, more in ((nvidia, "jetson-orin", {}), (save_artifact(tmp_path / "tiny").path, HERE, secret)):
        archive = bundle(artifact, target=target, out=tmp_path / "bundle.tar", **more)
        with tarfile.open(archive) as file:
            names = [Path(name).name for name in file.getnames()]
            assert "run.py" in names
            assert "run.cpp" not in names
