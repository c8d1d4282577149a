"""A bundle made on this machine proves itself on another architecture: Debian's Python for arm64 under qemu.

What is right there is right on such a device; how fast it is there says nothing. `make test-aarch64` brings what it needs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_artifacts import save_artifact
from tiny_models import add_pooling, save_model

import onnxpress
from onnxpress.bundle import bundle

PYTHON = Path(__file__).parents[2] / ".devices" / "aarch64" / "python"
pytestmark = [
    pytest.mark.aarch64,
    pytest.mark.skipif(
        not (PYTHON.parent / "made-by").is_file(),
        reason="bundles are not tried on arm64: that takes make test-aarch64, or tests/devices/setup.sh aarch64",
    ),
]


def unpacked(artifact: Path, target: str = "linux-aarch64") -> Path:
    archive = bundle(artifact, target=target, out=artifact.parent / f"{target}.tar")
    with tarfile.open(archive) as file:
        file.extractall(artifact.parent, filter="data")
    return artifact.parent / f"{json.loads((artifact / 'manifest.json').read_text())['name']}-{target}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(save_artifact(tmp_path_factory.mktemp("arm") / "tiny").path)


def there(folder: Path, *arguments: str, processor: str = "cortex-a76") -> subprocess.CompletedProcess[str]:
    """run.py on an emulated processor. cortex-a76 is a Raspberry Pi 5's, with integer dot products."""
    return subprocess.run(
        [PYTHON, folder / "run.py", *arguments],
        env={"PATH": os.environ["PATH"], "QEMU_CPU": processor},
        capture_output=True,
        text=True,
    )


def self_test(folder: Path, **options: Any) -> tuple[bool, dict[str, str]]:
    """The verdict, and what was found by what was looked at."""
    done = there(folder, "--self-test", "--json", **options)
    assert not done.stderr, done.stderr
    verdict = json.loads(done.stdout)
    assert done.returncode == (0 if verdict["good"] else 1)
    return verdict["good"], {line["what"]: line["found"] for line in verdict["lines"]}


def test_a_bundle_made_here_is_good_there(folder: Path) -> None:
    good, found = self_test(folder)
    assert good, found
    assert "linux aarch64" in found["machine"]
    assert found["golden pair"].startswith("embeddings: difference")


def test_it_answers_there_as_here(folder: Path) -> None:
    done = there(folder, "the cat")
    assert (done.returncode, done.stderr) == (0, "")
    expected = onnxpress.load(folder / "model" / "linux-aarch64").answer_texts(["the cat"])
    np.testing.assert_allclose(json.loads(done.stdout), expected[0], atol=1e-6)


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("int8")
    model = save_model(place / "model", "bert")
    add_pooling(model, ("Pooling", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}))
    options: dict[str, Any] = {"measure": False, "samples": 24, "calibration_samples": 16, "budget": "0.9"}
    built = onnxpress.build(model, out=place / "small", precision="int8", target="cpu-arm64", **options)
    return unpacked(built.path)


@pytest.mark.parametrize("processor", ["cortex-a72", "max"])  # without dot products, and with matrix products of 8 bits
def test_int8_answers_alike_with_each_kind_of_kernels(int8: Path, processor: str) -> None:
    good, found = self_test(int8, processor=processor)
    assert good, found


def test_a_flipped_bit_is_seen_there(folder: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(folder, tmp_path / folder.name)
    model = changed / "model" / "linux-aarch64" / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    good, found = self_test(changed)
    assert not good
    assert found["failed"].endswith("model.onnx was changed after the bundle was made. Copy the bundle again.")


def test_a_bundle_for_another_architecture_is_refused_there(tmp_path: Path) -> None:
    other = unpacked(save_artifact(tmp_path / "tiny").path, "linux-x86_64")
    good, found = self_test(other)
    assert not good
    assert found["failed"].startswith(
        "This bundle is for linux-x86_64 (linux x86_64); this machine is linux aarch64. Make one for it"
    )
