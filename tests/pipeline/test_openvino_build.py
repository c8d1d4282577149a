"""Builds for OpenVINO: every precision of its target, networks of images too, bundles, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from loadable import needs_openvino
from tiny_artifacts import HERE
from tiny_decoders import save_decoder
from tiny_models import load_text_model, save_model

import onnxpress
from onnxpress.cli import main
from onnxpress.devices import check_fit
from onnxpress.errors import ProviderError, RecipeError
from onnxpress.press import Press
from onnxpress.runtime import openvino
from onnxpress.runtime.saturation import products_saturate

QUICK = {"measure": False, "samples": 24, "calibration_samples": 16}
TEXTS = ["the cat sat on a mat", "a red dog ran to the blue house", "the"]


exact = pytest.mark.skipif(
    products_saturate(), reason="int8 for OpenVINO was not tried on CPUs whose products overflow"
)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("models") / "bert", "bert", tf.AutoModelForSequenceClassification, num_labels=3
    )


@needs_openvino
@pytest.mark.parametrize(
    ("precision", "half"), [("fp32", False), ("bf16", True), pytest.param("int8-qdq", True, marks=exact)]
)
def test_a_classifier_answers_like_pytorch(precision: str, half: bool, classifier: Path, tmp_path: Path) -> None:
    built = onnxpress.build(classifier, out=tmp_path / "out", target="openvino", precision=precision, **QUICK)
    assert built.manifest.session["providers"] == ["openvino"]
    assert built.manifest.session.get("half_floats", False) is half
    assert built.manifest.session.get("exact_products", False) is (precision == "int8-qdq")
    assert "Attention" not in built.manifest.operators
    runner = onnxpress.load(built.path)
    assert runner.session.providers == ("openvino",)
    placed = runner.session.placement()
    assert sum(provider == "OpenVINOExecutionProvider" for provider in placed.values()) > 0.9 * len(placed)
    original = load_text_model(classifier, tf.AutoModelForSequenceClassification)
    tokenizer = tf.AutoTokenizer.from_pretrained(classifier)
    with torch.no_grad():
        expected = original(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.softmax(-1).numpy()
    labels = [original.config.id2label[index] for index in range(3)]
    found = np.array([[row["scores"][label] for label in labels] for row in runner.predict(TEXTS)])  # type: ignore[union-attr]
    tolerance = {"fp32": 1e-5, "bf16": 0.02, "int8-qdq": 0.1}[precision]  # 8 bits of a model of width 32
    np.testing.assert_allclose(found, expected, atol=tolerance)


@needs_openvino
def test_the_clock_undoes_nothing_without_which_a_graph_does_not_run(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Press, "_slower", lambda *_: "slower")
    built = onnxpress.build(classifier, target="openvino", precision="fp32", out=tmp_path / "out")
    rows = {row["pass"]: row for row in built.manifest.ledger}
    assert (rows["plain-attention"]["status"], rows["select-early"]["status"]) == ("kept", "undone")
    assert "slower" in rows["plain-attention"]["reason"]


@needs_openvino
def test_a_build_is_timed_on_it(classifier: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["build", str(classifier), "--target", "openvino", "--precision", "fp32", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    ledger = json.loads((tmp_path / "out" / "manifest.json").read_text())["ledger"]
    assert [row["status"] for row in ledger if row["pass"] == "plain-attention"] == ["kept"]
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert "not timed" not in measured["note"]
    assert {row["system"] for row in measured["latency"]} == {"PyTorch", "export", "artifact"}
    capfd.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["run", str(tmp_path / "out"), "--text", "the cat"]) == 0
    assert "Warning" not in capfd.readouterr().err


@needs_openvino
def test_what_it_has_no_kernel_for_is_said_in_the_words_of_a_build(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Attention \(2\) would run on the CPU.*put plain-attention into `only`"):
        onnxpress.build(classifier, out=tmp_path / "out", target="openvino", only=["int8-qdq"], **QUICK)
    assert not (tmp_path / "out").exists()


class Averages(torch.nn.Module):
    """A mean over the last of three axes and numbers of each channel, which OpenVINO misreads in batches, in float32 too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shift, self.out = torch.nn.Parameter(torch.randn(16)), torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(x).mean(-1) + self.shift)


@needs_openvino
@pytest.mark.parametrize("precision", ["fp32", pytest.param("int8-qdq", marks=exact)])
def test_what_openvino_misreads_is_spelled_before_it_runs(precision: str, tmp_path: Path) -> None:
    network = Averages().eval()
    built = onnxpress.build(
        network,
        example_inputs={"x": torch.randn(2, 16, 8)},
        out=tmp_path / "out",
        target="openvino",
        precision=precision,
        measure=False,
    )
    assert "spelled as OpenVINO reads them right: 1 reductions" in built.manifest.ledger[0]["notes"]
    session = onnxpress.load(built.path).session
    for batch in (1, 2, 5):
        x = torch.randn(batch, 16, 8)
        with torch.no_grad():
            expected = network(x).numpy()
        found = next(iter(session.run({"x": x.numpy()}).values()))
        np.testing.assert_allclose(found, expected, atol=1e-5 if precision == "fp32" else 0.05)


@needs_openvino
@exact
def test_images_run_on_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 16, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 5),
    ).eval()
    built = onnxpress.build(
        network,
        example_inputs={"input": torch.randn(4, 3, 16, 16)},
        out=tmp_path / "out",
        target="openvino",
        precision="int8-qdq",
        budget="5%",
        measure=False,
    )
    images = np.random.default_rng(1).normal(size=(4, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    session = onnxpress.load(built.path).session
    found = next(iter(session.run({session.input_names[0]: images}).values()))
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_a_build_without_the_package_says_so(classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "version_of", lambda package: None)
    built = onnxpress.build(classifier, out=tmp_path / "out", target="openvino", precision="fp32", **QUICK)
    assert "tried on the CPU provider and not timed: The provider openvino was asked for" in built.measured["note"]
    with pytest.raises(ProviderError, match="pip install onnxruntime-ep-openvino"):
        onnxpress.load(built.path)
    assert onnxpress.load(built.path, providers=("cpu",)).session.providers == ("cpu",)
    with pytest.raises(RecipeError, match="Speed is to be preferred, and nothing is timed here"):
        onnxpress.build(classifier, out=tmp_path / "fast", target="openvino", budget="1%", prefer="speed")


def test_language_models_are_refused(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", "llama")
    with pytest.raises(RecipeError, match=r"'openvino' takes no language models.*--target cpu"):
        onnxpress.build(folder, out=tmp_path / "out", target="openvino")


@pytest.mark.parametrize("precision", ["int8", "fp16", "int4-weights"])
def test_precisions_of_other_targets_are_refused(precision: str, classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="int8-qdq, bf16, fp32"):
        onnxpress.build(classifier, out=tmp_path / "out", target="openvino", precision=precision)


@needs_openvino
def test_a_bundle_asks_for_its_package(classifier: Path, tmp_path: Path) -> None:
    built = onnxpress.build(classifier, out=tmp_path / "out", target="openvino", precision="fp32", **QUICK)
    assert main(["bundle", str(built.path), "--target", HERE, "--out", str(tmp_path / "b.tar")]) == 0
    with tarfile.open(tmp_path / "b.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    [folder] = [path.parent for path in tmp_path.glob("*/bundle.json")]
    described = json.loads((folder / "bundle.json").read_text())
    assert described["providers"] == ["openvino", "cpu"]
    assert any(line.startswith("onnxruntime-ep-openvino>=") for line in described["requires"])
    done = subprocess.run(
        [sys.executable, "run.py", "--self-test"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "openvino" in done.stdout
    with pytest.raises(RecipeError, match="does not suit raspberry-pi-5"):
        check_fit("raspberry-pi-5", built.manifest)
