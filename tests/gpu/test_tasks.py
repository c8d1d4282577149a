"""Each family of tasks: built for CUDA where the card is, it answers on the card like PyTorch and like the CPU provider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import save_model

import onnxpress
from onnxpress.artifact import Artifact
from onnxpress.runtime import load

TEXTS = ["the cat sat on a mat", "a red dog", "the blue house ran to the mat on a red mat", "cat"]
FAMILIES: dict[str, tuple[str, Any]] = {
    "feature-extraction": ("bert", tf.AutoModel),
    "text-classification": ("roberta", tf.AutoModelForSequenceClassification),
    "token-classification": ("distilbert", tf.AutoModelForTokenClassification),
    "question-answering": ("bert", tf.AutoModelForQuestionAnswering),
    "fill-mask": ("modernbert", tf.AutoModelForMaskedLM),
}
# Relative to the largest number: TF32 is off; 11 and 8 bits of mantissa through a few layers whose weights are large.
TOLERANCES = {"fp32": 2e-5, "fp16": 1e-2, "bf16": 8e-2}


@pytest.mark.parametrize("precision", list(TOLERANCES))
@pytest.mark.parametrize("task", list(FAMILIES))
def test_a_task_on_the_card(task: str, precision: str, tmp_path: Path) -> None:
    name, kind = FAMILIES[task]
    folder = save_model(tmp_path / "model", name, kind)
    built = onnxpress.build(
        folder, task=task, target="cuda", precision=precision, keep_all=True, out=tmp_path / "a"
    ).path
    manifest = Artifact.open(built).manifest
    assert manifest.precision == precision
    exact = onnxpress.build(folder, task=task, target="cpu", precision="fp32", out=tmp_path / "b").path
    samples = [(TEXTS[1], text) for text in TEXTS] if task == "question-answering" else TEXTS
    found = load(built, providers=["cuda"]).outputs(samples)
    for sample, answer in zip(load(exact).outputs(samples), found, strict=True):
        for output, expected in sample.items():
            allowed = TOLERANCES[precision] * max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(answer[output], expected, rtol=0, atol=allowed)


def test_a_convolution_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 8, 3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 6 * 6, 10),
    ).eval()
    images = torch.randn(4, 3, 16, 16)
    for precision, allowed in (("fp32", 1e-5), ("fp16", 2e-2)):
        built = onnxpress.build(
            network,
            example_inputs=(images,),
            target="cuda",
            precision=precision,
            keep_all=True,
            out=tmp_path / precision,
        ).path
        session = load(built, providers=["cuda"]).session
        with torch.inference_mode():
            expected = network(images).numpy()
        for _ in range(3):
            (found,) = session.run({session.input_names[0]: images.numpy()}).values()
            np.testing.assert_allclose(found, expected, rtol=0, atol=allowed * max(1.0, float(np.abs(expected).max())))
