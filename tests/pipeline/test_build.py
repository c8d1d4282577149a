"""Whole builds of tiny models: every task, the gate's decisions, reproducible bytes, bad input, and real kills."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as tf
from tiny_models import add_pooling, load_text_model, save_model
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import onnxpress
from onnxpress import artifact as artifact_module
from onnxpress import pipeline
from onnxpress.cli import main
from onnxpress.errors import (
    BudgetError,
    ConversionError,
    InputError,
    OutputError,
    ParityError,
    RecipeError,
    SourceError,
)
from onnxpress.exporters import export
from onnxpress.graph import Graph
from onnxpress.optimizers.base import PassContext, PassResult
from onnxpress.optimizers.edits import add_constant
from onnxpress.optimizers.select_early import SelectEarly
from onnxpress.recipe import recipe_of
from onnxpress.runtime import Embedder, FillMask, ModuleRunner, QuestionAnswerer, TextClassifier, TokenClassifier
from onnxpress.runtime.tensor_file import read_tensors

QUICK = {"measure": False, "samples": 24, "calibration_samples": 16}
TEXTS = ["the cat sat on a mat", "a red dog ran to the blue house", "the"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("models") / "encoder", "bert")
    add_pooling(
        folder, ("Pooling", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}), ("Normalize", None)
    )
    return folder


def test_an_encoder_becomes_an_artifact_that_answers_like_pytorch(encoder: Path, tmp_path: Path) -> None:
    built = onnxpress.build(encoder, out=tmp_path / "out", precision="fp32", **QUICK)
    runner = onnxpress.load(built.path)
    assert isinstance(runner, Embedder)
    model, tokenizer = load_text_model(encoder), tf.AutoTokenizer.from_pretrained(encoder)
    for text, vector in zip(TEXTS, runner.embed(TEXTS), strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
        np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_an_artifact_carries_its_proof(encoder: Path, tmp_path: Path) -> None:
    options = {"precision": "int8", "budget": "0.9", "samples": 24, "calibration_samples": 16}
    built = onnxpress.build(encoder, out=tmp_path / "out", **options)
    assert {path.name for path in built.path.iterdir()} >= {
        "manifest.json", "measured.json", "report.html", "model.onnx", "golden.safetensors", "tokenizer.json",
    }  # fmt: skip
    manifest = built.manifest
    assert manifest.ledger[0]["pass"] == "export"
    assert manifest.operators["Attention"] == 2
    assert set(manifest.files) == {path.name for path in built.path.iterdir()} - {
        "manifest.json", "measured.json", "report.html",
    }  # fmt: skip
    assert built.measured["latency"]
    assert built.measured["tokens_per_chunk"] in (128, 256, 512)
    assert "<svg" in (built.path / "report.html").read_text()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("auto_class", "task", "runner_class"),
    [
        (tf.AutoModelForSequenceClassification, "text-classification", TextClassifier),
        (tf.AutoModelForTokenClassification, "token-classification", TokenClassifier),
        (tf.AutoModelForQuestionAnswering, "question-answering", QuestionAnswerer),
        (tf.AutoModelForMaskedLM, "fill-mask", FillMask),
    ],
)
def test_every_task_builds_at_int8_and_loads(auto_class: type, task: str, runner_class: type, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "bert", auto_class)
    built = onnxpress.build(folder, out=tmp_path / "out", precision="int8", keep_all=True, **QUICK)
    assert built.manifest.task == task
    assert built.manifest.precision == "int8"
    assert built.manifest.operators["com.microsoft::MatMulIntegerToFloat"] >= 12
    assert isinstance(onnxpress.load(built.path), runner_class)


def test_a_classifier_that_reads_the_last_end_token_of_a_text(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "bart", tf.AutoModelForSequenceClassification, num_labels=3)
    with pytest.raises(RecipeError, match=r"fails on the texts .*at least one <eos> token.*: give texts that it takes"):
        onnxpress.build(folder, out=tmp_path / "out", precision="fp32", **QUICK)

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] [SEP] $B [SEP]", special_tokens=[("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    built = onnxpress.build(folder, out=tmp_path / "out", precision="int8", keep_all=True)  # PyTorch is timed too
    classifier = onnxpress.load(built.path)
    texts = ["the cat sat", ("a dog ran", "a red house"), "the mat"]
    for together, text in zip(classifier.predict(texts), texts, strict=True):
        assert together["score"] == pytest.approx(classifier.predict([text])[0]["score"], abs=1e-5)


def test_the_same_recipe_gives_the_same_bytes(encoder: Path, tmp_path: Path) -> None:
    """All but measured.json and report.html, which hold times. Once here, once in a new process with another seed of hashes."""
    options = {"name": "same", "precision": "int8", "keep_all": True, **QUICK}
    onnxpress.build(encoder, out=tmp_path / "one", **options)
    code = f"import onnxpress; onnxpress.build({str(encoder)!r}, out={str(tmp_path / 'two')!r}, **{options!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "67"})
    digests = [
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / name).iterdir()
            if path.name not in (artifact_module.MEASURED, artifact_module.REPORT)
        }
        for name in ("one", "two")
    ]
    assert digests[0] == digests[1]
    assert "manifest.json" in digests[0]


def test_a_precision_asked_for_by_name_that_breaks_the_budget_is_an_error(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"int4.*--keep-all"):
        onnxpress.build(encoder, out=tmp_path / "out", precision="int4-weights", budget="0.999999", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_lossy_pass_is_repaired(encoder: Path, tmp_path: Path) -> None:
    """Between what all of int8 costs and what half of it costs there is a budget that repair can keep."""
    whole = onnxpress.build(encoder, out=tmp_path / "whole", precision="int4-weights", keep_all=True, **QUICK)
    loss = 1 - whole.manifest.ledger[-1]["quality"]
    assert loss > 1e-4
    built = onnxpress.build(
        encoder, out=tmp_path / "out", precision="int4-weights", budget=str(1 - 0.7 * loss), **QUICK
    )
    row = built.manifest.ledger[-1]
    assert row["status"] == "repaired"
    assert "places stay at 8 bits" in row["reason"]
    assert row["quality"] >= 1 - 0.7 * loss
    operators = built.manifest.operators
    assert operators["com.microsoft::MatMulNBits"] >= 1
    assert operators.get("MatMul", 0) + operators.get("Gather", 0) >= 1


def test_dynamic_int8_runs_rows_alone_where_batches_move_answers(encoder: Path, tmp_path: Path) -> None:
    built = onnxpress.build(encoder, out=tmp_path / "out", precision="int8-dynamic", budget="0.5", **QUICK)
    row = built.manifest.ledger[-1]
    runner = onnxpress.load(built.path)
    assert isinstance(runner, Embedder)
    if row["status"] == "repaired":
        assert runner.tokens_per_chunk == 1
    together, alone = runner.embed(TEXTS), np.stack([runner.embed([text])[0] for text in TEXTS])
    cosines = (together * alone).sum(1)
    assert cosines.mean() >= 0.999


def test_user_samples_with_scores(encoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    rows = [f"the cat sat,the {word} ran,{score}" for score, word in enumerate(("dog", "cat", "mat", "house", "red"))]
    path.write_text("sentence1,sentence2,score\n" + "\n".join(rows) + "\n")
    built = onnxpress.build(encoder, out=tmp_path / "out", precision="fp32", file=str(path), **QUICK)
    assert built.manifest.ledger[0]["metric"] == "spearman"


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4),
            torch.nn.Flatten(), torch.nn.Linear(128, 64), torch.nn.GELU(), torch.nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image)


def test_a_plain_module(tmp_path: Path) -> None:
    module = Convolutions().eval()
    example = torch.randn(2, 3, 16, 16)
    built = onnxpress.build(
        module, example_inputs=(example,), out=tmp_path / "out", precision="int8", budget="0.9", **QUICK
    )
    runner = onnxpress.load(built.path)
    assert isinstance(runner, ModuleRunner)
    image = np.random.default_rng(0).standard_normal((5, 3, 16, 16)).astype(np.float32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(image)).numpy()
    found = runner.run({"image": image})["output_0"]
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.1  # 8 bits, two layers, random weights
    assert any("random inputs" in note for note in built.manifest.ledger[0]["notes"])


def test_linear_layers_one_after_the_other(tmp_path: Path) -> None:
    """One reads what another answers, with nothing between."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(64, 96), torch.nn.BatchNorm1d(96), torch.nn.Linear(96, 64), torch.nn.Linear(64, 64, bias=False)
    )
    for precision in ("int8", "int8-dynamic", "int8-qdq"):
        artifact = onnxpress.build(
            layers, example_inputs=torch.randn(4, 64), out=tmp_path / precision, precision=precision, **QUICK
        )
        row = next(row for row in artifact.manifest.ledger if row["pass"] == precision)
        assert (row["status"], "3 " in row["notes"][0]) == ("kept", True), row


def test_a_module_whose_batches_move_answers_is_not_kept(tmp_path: Path) -> None:
    """A dynamic scale is one for a whole batch, and nobody cuts a module's batches into single rows."""

    class Exponential(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.exp(2 * x))

    options = {"example_inputs": (torch.randn(2, 64),), "precision": "int8-dynamic", "budget": "0.1", **QUICK}
    with pytest.raises(BudgetError, match="alone against batched"):
        onnxpress.build(Exponential().eval(), out=tmp_path / "out", **options)


def test_a_module_that_compares_the_rows_of_a_batch(tmp_path: Path) -> None:
    """Its own answers move with their batch-mates, so that nothing is asked of a pass there; the likeness is as it was."""

    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.images, self.texts = torch.nn.Linear(32, 64), torch.nn.Linear(16, 64)

        def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            normalize = torch.nn.functional.normalize
            return 20 * normalize(self.images(image), dim=-1) @ normalize(self.texts(text), dim=-1).T  # (batch, batch)

    module = Towers().eval()
    artifact = onnxpress.build(
        module, example_inputs=(torch.randn(4, 32), torch.randn(4, 16)), out=tmp_path / "out", precision="int8", **QUICK
    )
    export, *_, row = artifact.manifest.ledger
    assert (row["status"], "batch_cosine" in row) == ("kept", False)
    assert any("move with their batch-mates" in note for note in export["notes"])
    image, text = torch.randn(7, 32), torch.randn(7, 16)
    found = onnxpress.load(artifact.path).run({"image": image.numpy(), "text": text.numpy()})["output_0"]
    with torch.inference_mode():
        np.testing.assert_allclose(found, module(image, text).numpy(), atol=0.5)  # of 20; two layers of 8 bits


def test_a_module_that_refuses_random_inputs_is_named(tmp_path: Path) -> None:
    class Roots(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_compiling() and bool((x < 0).any()):
                raise ValueError("no roots of these")
            return x.sqrt()

    with pytest.raises(RecipeError, match=r"Roots fails on the arrays .*no roots of these\): give arrays"):
        onnxpress.build(
            Roots(), example_inputs=(torch.full((2, 64), 0.5),), out=tmp_path / "out", precision="fp32", **QUICK
        )


def test_an_axis_that_is_also_another_one(tmp_path: Path) -> None:
    """A graph's nodes and its adjacency: rows of one cannot be cut without the other."""

    class Neighbours(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
            return adjacency @ self.linear(x)

    artifact = onnxpress.build(
        Neighbours(),
        example_inputs=(torch.randn(6, 64), torch.randn(6, 6)),
        dynamic_axes={"x": {0: "n"}, "adjacency": {0: "n", 1: "n"}},
        out=tmp_path / "out",
        precision="int8",
        **QUICK,
    )
    assert artifact.manifest.ledger[-1]["status"] == "kept"


def test_half_precision_for_a_card_that_is_not_here(tmp_path: Path) -> None:
    """What passes 65504 overflows in trials as it would there; a module of float16 keeps its arrays."""

    class Large(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(32, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(1e-5 * (300 * (300 * self.linear(x))))

    options = {"example_inputs": (torch.randn(2, 32),), "target": "cuda", **QUICK}
    artifact = onnxpress.build(Large(), out=tmp_path / "out", precision="fp16", **options)
    row = artifact.manifest.ledger[-1]
    assert (row["status"], "stay in float" in row["reason"]) == ("repaired", True)

    class Stored(Large):
        """A table alone is in half precision."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + self.table[(x[:, 0] > 0).long()].float())

    stored = Stored()
    stored.register_buffer("table", torch.randn(2, 32).half())
    artifact = onnxpress.build(stored, out=tmp_path / "out", precision="fp16", **options)
    assert artifact.manifest.ledger[-1]["status"] == "repaired"
    options["example_inputs"] = (torch.randn(2, 32).half(),)
    artifact = onnxpress.build(torch.nn.Linear(32, 64).half(), out=tmp_path / "out", precision="fp32", **options)
    assert artifact.manifest.signature.inputs[0].dtype == "float16"


class WithOutlier(torch.nn.Module):
    """A channel a hundred times as large as the others, which 8 bits take with them."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.answer, self.first, self.last = answer, torch.nn.Linear(64, 64), torch.nn.Linear(64, 9)
        self.register_buffer("scale", torch.ones(64))
        self.scale[0] = 3000.0
        with torch.no_grad():
            self.first.weight[:, 0] *= 3e-4

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.answer(self.last(torch.tanh(self.first(x * self.scale))), mask)
        return answer


@pytest.mark.parametrize(
    ("answer", "rows"),
    [
        (lambda logits, mask: logits + (1 - mask) * -1e4, 2),  # the example's mask hides nothing
        (lambda logits, mask: (logits * mask).softmax(0), 1),  # of one row always 1
    ],
)
def test_what_hides_that_logits_are_lost(answer: Any, rows: int, tmp_path: Path) -> None:
    inputs = (torch.randn(rows, 64), torch.ones(rows, 9))
    with pytest.raises(BudgetError, match="int8"):
        onnxpress.build(WithOutlier(answer), example_inputs=inputs, out=tmp_path / "out", precision="int8", **QUICK)


def test_labels_beside_infinite_masks(tmp_path: Path) -> None:
    module = WithOutlier(lambda logits, mask: logits.masked_fill(mask == 0, -torch.inf))
    x, mask = torch.randn(200, 64), (torch.rand(200, 9) < 0.4).float()
    mask[:, 0] = 1
    labels = module(x, mask).argmax(1)
    np.savez(tmp_path / "samples.npz", x=x.numpy(), mask=mask.numpy(), labels=labels.numpy())
    options = {"example_inputs": (x[:4], mask[:4]), "file": str(tmp_path / "samples.npz"), "measure": False}
    assert (
        onnxpress.build(module, out=tmp_path / "out", precision="fp32", **options).manifest.ledger[0]["quality"] == 100
    )
    with pytest.raises(BudgetError, match="accuracy"):
        onnxpress.build(module, out=tmp_path / "out", precision="int8", **options)


def test_golden_answers_are_judged_beside_masks(tmp_path: Path) -> None:
    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                "elevation": 100 * x - 4000,
                "distance": torch.where(mask == 0, 1e9, x.abs()),
                "scores": x + (1 - mask) * -1e4,
                "price": torch.cat([x, (3 * x).round().clamp(0, 4) * 1000], 1),
            }

    inputs = (torch.randn(8, 3), torch.tensor([[1.0, 1, 0], [1, 1, 1]]).repeat(4, 1))
    built = onnxpress.build(Both(), example_inputs=inputs, out=tmp_path / "out", precision="fp32", **QUICK)
    golden = read_tensors(built.path / "golden.safetensors")
    hidden = golden["input.first.mask"] == 0
    np.testing.assert_array_equal(golden["output.first.scores"] < -9000, hidden)
    np.testing.assert_array_equal(golden["output.first.distance"] == 1e9, hidden)
    tolerances, sizes = (built.manifest.options[name] for name in ("golden_tolerance", "golden_size"))
    assert sizes.keys() == {"distance", "scores", "price"}
    assert max(tolerances[name] for name in sizes) < 0.01
    assert tolerances["elevation"] == pytest.approx(4, rel=0.2)


class Likeness(torch.nn.Module):
    """Of each text with each image, and the number that it is scaled by."""

    def __init__(self) -> None:
        super().__init__()
        ready = WithOutlier(lambda logits, mask: logits)
        self.tower, self.scale = ready, torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, texts: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        one, other = (torch.nn.functional.normalize(self.tower(given, None), dim=1) for given in (texts, images))
        return (self.scale.exp() * one @ other.T).softmax(1), self.scale.exp()


@pytest.mark.parametrize("axes", [None, {"texts": {0: "texts"}, "images": {0: "images"}}])
def test_likenesses_are_judged_on_several_rows(axes: Any, tmp_path: Path) -> None:
    inputs = (torch.randn(1, 64), torch.randn(1, 64))
    with pytest.raises(BudgetError, match="int8"):  # of one row each the answer is 1
        onnxpress.build(
            Likeness(), example_inputs=inputs, dynamic_axes=axes, out=tmp_path / "out", precision="int8", **QUICK
        )


def test_states_by_layer_do_not_pair_rows(tmp_path: Path) -> None:
    built = onnxpress.build(
        torch.nn.LSTM(16, 8, batch_first=True),
        example_inputs=torch.randn(1, 5, 16),
        out=tmp_path / "out",
        precision="fp32",
        **QUICK,
    )
    assert built.manifest.signature.outputs[1].shape == (1, "batch", 8)
    assert "batch-mates" not in str(built.manifest.ledger)
    assert read_tensors(built.path / "golden.safetensors")["input.first.input"].shape == (1, 5, 16)


def test_labels_beside_likenesses(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "pairs.npz",
        texts=np.ones((9, 64), np.float32),
        images=np.ones((9, 64), np.float32),
        labels=np.arange(9),
    )
    inputs = (torch.randn(2, 64), torch.randn(2, 64))
    with pytest.raises(RecipeError, match="has one for each sample of a call"):
        onnxpress.build(
            Likeness(),
            example_inputs=inputs,
            out=tmp_path / "out",
            file=str(tmp_path / "pairs.npz"),
            precision="int8",
            measure=False,
        )


def test_a_network_that_wants_several_rows_is_judged_on_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64, track_running_stats=False), torch.nn.Linear(64, 8))
    built = onnxpress.build(
        torch.nn.Sequential(*layers), example_inputs=torch.randn(8, 64), out=tmp_path / "out", precision="int8", **QUICK
    )
    assert "the original's answers move with their batch-mates" in str(built.manifest.ledger[0]["notes"])
    assert built.manifest.ledger[-1]["quality"] > 0.99


def test_half_precision_does_not_end_the_process(tmp_path: Path) -> None:
    """Transpose before MatMul, as a file, on ONNX Runtime's CPU provider: its NchwcTransformer reads what is not there."""
    code = (
        "import sys, torch, onnxpress\n"
        "from onnxpress.cli import main\n"
        "class Tagger(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.gru, self.linear = torch.nn.GRU(32, 24, batch_first=True), torch.nn.Linear(24, 9)\n"
        "    def forward(self, x):\n"
        "        return self.linear(self.gru(x)[0])\n"
        "options = {'target': 'cuda', 'precision': 'fp16', 'measure': False}\n"
        "built = onnxpress.build(Tagger(), example_inputs=(torch.randn(2, 12, 32),), out='built', **options)\n"
        "assert onnxpress.load(built.path, providers=['cpu']).session.run({'x': torch.randn(3, 12, 32).numpy()})\n"
        "sys.exit(main(['inspect', 'built/model.onnx']) or main(['build', 'built/model.onnx', '--no-measure', '--precision', 'fp32']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        artifact_module.Artifact.open(tmp_path / "artifacts" / "model").manifest.signature.inputs[0].dtype == "float32"
    )


def test_prompts_of_sentence_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model", "distilbert")
    add_pooling(folder, ("Pooling", {"pooling_mode": "mean"}))
    prompts = {"query": "the cat ", "document": "", "passage": "on "}
    declared = folder / "config_sentence_transformers.json"
    declared.write_text(json.dumps({"prompts": prompts, "default_prompt_name": "query"}))
    built = onnxpress.build(folder, out=tmp_path / "out", precision="fp32", **QUICK)
    assert built.manifest.options["prompts"] == prompts
    assert any("query, passage; query is there where none" in note for note in built.manifest.ledger[0]["notes"])
    runner: Any = onnxpress.load(built.path)

    def vectors(*texts: Any, **more: Any) -> list[list[float]]:
        found: list[list[float]] = runner.embed(list(texts), **more).tolist()
        return found

    texts = ["sat", "ran on a mat"]
    asked = vectors(*("the cat " + text for text in texts), prompt="")
    assert vectors(*texts) == vectors(*texts, prompt="query") == asked
    assert vectors(*texts, prompt="passage") == vectors(*("on " + text for text in texts), prompt="") != asked
    assert vectors(("sat", "ran")) == vectors(("the cat sat", "ran"), prompt="") != vectors(("sat", "ran"), prompt="")
    assert vectors("sat", prompt="document") == vectors("sat", prompt="")
    with pytest.raises(InputError, match="no prompt 'title'; they are: document, passage, query"):
        vectors("sat", prompt="title")
    with pytest.raises(InputError, match=r"prompt is \['query'\]"):
        vectors("sat", prompt=["query"])
    with pytest.raises(InputError, match="Text 0 is empty"):
        vectors(" ")
    capsys.readouterr()
    assert main(["run", str(built.path), "--text", "sat", "--prompt-name", "passage", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == vectors("on sat", prompt="")
    declared.write_text(json.dumps({"prompts": prompts, "default_prompt_name": "document"}))
    assert export(folder).options["default_prompt"] == "document"
    for hostile in ({"prompts": ["query"]}, {"prompts": {"query": 3}, "default_prompt_name": ["query"]}):
        declared.write_text(json.dumps(hostile))
        assert {"prompts", "default_prompt"}.isdisjoint(export(folder).options)


def test_a_batch_that_is_traced_wrongly_can_be_fixed(tmp_path: Path) -> None:
    class Written(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(x)
            for column, given in zip(out.unbind(1), x.unbind(1), strict=True):
                column.copy_(2 * given)  # the trace takes the example's batch for the only one
            return out

    options = {"example_inputs": (torch.randn(4, 3),), "precision": "fp32", **QUICK}
    with pytest.raises(ConversionError, match=r"dynamic_axes=\{\}"):
        onnxpress.build(Written(), out=tmp_path / "out", **options)
    artifact = onnxpress.build(Written(), out=tmp_path / "out", dynamic_axes={}, **options)
    x = np.ones((4, 3), np.float32)
    np.testing.assert_array_equal(onnxpress.load(artifact.path).run({"x": x})["output_0"], 2 * x)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_layers_in_half_precision_are_to_be_given_in_float(tmp_path: Path, half: torch.dtype) -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(64, 8).to(half)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.to(self.layer.weight.dtype)).float()

    torch.manual_seed(0)
    options = {"example_inputs": (torch.randn(4, 64),), "precision": "fp32", **QUICK}
    with pytest.raises((ParityError, ConversionError), match=r"\. Some of its layers are in half precision.*float\(\)"):
        onnxpress.build(Mixed(), out=tmp_path / "out", **options)
    onnxpress.build(Mixed().float(), out=tmp_path / "out", **options)


def test_dynamic_axes_and_indices_of_a_module(tmp_path: Path) -> None:
    """More positions and larger ids than the example has, up to what the module takes."""

    class Bag(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(1000, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table(ids).sum(1)

    module = Bag().eval()
    built = onnxpress.build(
        module,
        example_inputs=(torch.randint(0, 100, (2, 1500)),),
        dynamic_axes={"ids": {0: "batch", 1: "length"}},
        out=tmp_path / "out",
        precision="fp32",
        **QUICK,
    )
    runner = onnxpress.load(built.path)
    ids = np.full((1, 3000), 999)
    with torch.inference_mode():
        expected = module(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(runner.run({"ids": ids})["output_0"], expected, rtol=1e-4)
    with pytest.raises(InputError, match="0 to 999"):
        runner.run({"ids": ids + 1})


def test_names_of_artifacts(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version is part of a name: two sizes of one model must not share a folder."""
    folder = tmp_path / "tiny-v1.5"
    folder.symlink_to(encoder)
    monkeypatch.chdir(tmp_path)
    built = onnxpress.build("tiny-v1.5", precision="fp32", **QUICK)
    assert built.manifest.name == "tiny-v1.5"
    assert built.path == tmp_path / "artifacts" / "tiny-v1.5"
    assert pipeline._free_folder(recipe_of("./tiny-v1.5/", {})) == Path("artifacts/tiny-v1.5")
    shutil.copytree(encoder, tmp_path / "other" / "tiny-v1.5")
    with pytest.raises(OutputError, match=r"holds an artifact of tiny-v1\.5, not of other/tiny-v1\.5: choose --out"):
        onnxpress.build("other/tiny-v1.5", precision="fp32", **QUICK)
    shutil.copytree(encoder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert onnxpress.build(".", precision="fp32", **QUICK).path == tmp_path / "here" / "artifacts" / "here"


def test_one_sample_of_the_user_is_enough(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text\nthe cat sat on a mat\n")
    options = {**QUICK, "file": str(tmp_path / "one.csv")}
    built = onnxpress.build(encoder, out=tmp_path / "out", precision="fp32", **options)
    assert built.manifest.ledger[0]["quality"] == 1


def test_an_encoder_is_judged_and_calibrated_on_lines_of_plain_text(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.txt").write_text("the cat sat on a mat\n\na red dog ran\r\n")
    (tmp_path / "calibrate.txt").write_text("the blue house\na dog sat\n")
    files = {"file": str(tmp_path / "judge.txt"), "calibration": str(tmp_path / "calibrate.txt")}
    built = onnxpress.build(encoder, out=tmp_path / "out", precision="int8", keep_all=True, **QUICK, **files)
    assert {row["metric"] for row in built.manifest.ledger} == {"cosine_mean"}
    golden = read_tensors(built.path / "golden.safetensors")
    ids = {name: golden[f"input.{name}.input_ids"].tolist() for name in ("single", "batch")}
    tokenizer = tf.AutoTokenizer.from_pretrained(encoder)
    assert ids == {
        "single": [tokenizer("the cat sat on a mat")["input_ids"]],
        "batch": [tokenizer("a red dog ran")["input_ids"]],
    }
    others = tmp_path / "others.txt"
    others.write_text("the blue house\na dog sat\n" * 8 + "sat sat sat\n" * 16)  # more than are looked at, and sorted
    other = onnxpress.build(
        encoder,
        out=tmp_path / "other",
        precision="int8",
        keep_all=True,
        **QUICK,
        **{**files, "calibration": str(others)},
    )
    assert built.manifest.files["model.onnx"] != other.manifest.files["model.onnx"]  # its scales are of those texts


def test_a_tagger_is_judged_by_columns_as_fit_reads_them(tmp_path: Path) -> None:
    labels = ["O", "B-ANIMAL", "I-ANIMAL"]
    folder = save_model(
        tmp_path / "model", "bert", tf.AutoModelForTokenClassification, id2label=dict(enumerate(labels))
    )
    (tmp_path / "dev.conll").write_text("the O\ncat B-ANIMAL\nsat O\n\na O\nred B-ANIMAL\ndog I-ANIMAL\n")
    options = {**QUICK, "file": str(tmp_path / "dev.conll")}
    built = onnxpress.build(folder, out=tmp_path / "out", precision="fp32", **options)
    runner = onnxpress.load(built.path)
    assert isinstance(runner, TokenClassifier)
    found = [
        {(item["start"], item["end"]) for item in answer} for answer in runner.predict(["the cat sat", "a red dog"])
    ]
    hits = ((4, 7) in found[0]) + ((2, 9) in found[1])
    expected = 200 * hits / (2 + sum(map(len, found)))
    assert (built.manifest.ledger[0]["metric"], built.manifest.ledger[0]["quality"]) == (
        "entity_f1",
        pytest.approx(expected, abs=1e-3),
    )


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"task": "dancing"}, SourceError, "dancing"),
        ({"task": "question-answering"}, SourceError, "no trained weights"),
        ({"target": "toaster"}, RecipeError, "targets are: cpu"),
        ({"precision": "int3"}, RecipeError, "int3"),
        ({"only": ("int9",)}, RecipeError, "int9"),
        ({"budget": "lots"}, RecipeError, "not understood"),
        ({"file": "nowhere.csv"}, RecipeError, "nowhere.csv"),
        ({"speed": 3}, RecipeError, "Unknown option 'speed'"),
        ({"max_length": 4000}, SourceError, "4000"),
    ],
)
def test_bad_options(
    options: dict[str, object], error: type[Exception], said: str, encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        onnxpress.build(encoder, out=tmp_path / "out", **{**QUICK, **options})
    assert list(tmp_path.iterdir()) == []


def test_bad_sources(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"this is no protobuf at all" * 10)
    for source, error in (
        (garbage, SourceError),
        (tmp_path / "none.onnx", SourceError),
        (tmp_path / "none", SourceError),
    ):
        with pytest.raises(error):
            onnxpress.build(source, out=tmp_path / "out", **QUICK)
    with pytest.raises(ConversionError, match="module"):
        onnxpress.build(garbage, task="fill-mask", out=tmp_path / "out", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["garbage.onnx"]


def test_an_output_that_cannot_be_written(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        onnxpress.build(encoder, out=tmp_path / "file" / "out", **QUICK)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not replaced"):
        onnxpress.build(encoder, out=tmp_path / "precious", **QUICK)
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_an_export_that_answers_otherwise_stops_the_build(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real wrong graph: one layer norm's weights are changed after the export."""
    from onnxpress import pipeline

    real = pipeline.export

    def spoiled(*arguments: object, **options: object) -> object:
        exported = real(*arguments, **options)  # type: ignore[arg-type]
        for name, value in exported.graph.model.graph.initializers.items():
            if "LayerNorm.bias" in name:
                value.const_value = ir.tensor(value.const_value.numpy() + 0.01, name=name)
        return exported

    monkeypatch.setattr(pipeline, "export", spoiled)
    with pytest.raises(ParityError, match=r"embeddings.*batch 1, length 1.*shape"):
        onnxpress.build(encoder, out=tmp_path / "out", **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("operator", "reason"),
    [("Unheard", "does not run"), ("Reshape", "does not run"), ("Neg", "changed the answers")],
)
def test_a_lossless_pass_whose_graph_is_wrong_is_undone(
    operator: str, reason: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real wrong graphs: one does not open, one fails when it runs, one answers otherwise."""

    def wrong(_: SelectEarly, graph: Graph, __: PassContext) -> PassResult:
        body = graph.model.graph
        output = body.outputs[0]
        shape = add_constant(graph, "shape", np.array([7, 5]))
        node = ir.node(operator, [output, shape] if operator == "Reshape" else [output])
        body.append(node)
        node.outputs[0].name, output.name = output.name, "before"
        node.outputs[0].type, node.outputs[0].shape = output.type, output.shape
        body.outputs[0] = node.outputs[0]
        return PassResult(graph=graph, changes=1)

    monkeypatch.setattr(SelectEarly, "apply", wrong)
    built = onnxpress.build(encoder, out=tmp_path / "out", precision="fp32", **QUICK)
    row = next(row for row in built.manifest.ledger if row["pass"] == "select-early")
    assert row["status"] == "undone"
    assert reason in row["reason"]
    assert onnxpress.load(built.path).embed(TEXTS).shape == (3, 32)


def test_kills_leave_nothing_broken_behind(encoder: Path, tmp_path: Path) -> None:
    """A build over an existing artifact is killed after several of its steps; then one runs through."""
    out = tmp_path / "out"
    before = onnxpress.build(encoder, out=out, precision="fp32", **QUICK).manifest.to_json()
    command = [
        sys.executable, "-m", "onnxpress", "build", str(encoder), "--out", str(out), "--precision", "fp32",
        "--no-measure", "--name", "second",
    ]  # fmt: skip
    for step in ("fold", "golden outputs"):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            assert any(line.strip().startswith(step) for line in process.stdout), f"the build has no step {step}"
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert artifact_module.Artifact.open(out).manifest.to_json() == before
    subprocess.run(command, check=True, capture_output=True)
    assert artifact_module.Artifact.open(out).manifest.name == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_missing_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "from onnxpress.cli import main\n"
        "sys.exit(main(['build', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "onnxpress[build" in done.stderr
    assert "Traceback" not in done.stderr


def test_json_of_a_build(encoder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--json", "--precision", "fp32", "--no-measure"]
    assert main(["build", str(encoder), *arguments]) == 0
    content = json.loads(capfd.readouterr().out)
    assert content["manifest"]["name"] == encoder.name
    assert content["path"] == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "metric"),
    [(1, "regression", "spearman"), (3, "single_label_classification", "accuracy")],
)
def test_labelled_classifiers_are_judged_by_their_own_metric(
    num_labels: int, problem_type: str, metric: str, tmp_path: Path
) -> None:
    folder = save_model(
        tmp_path / "model",
        "bert",
        tf.AutoModelForSequenceClassification,
        num_labels=num_labels,
        problem_type=problem_type,
    )
    rows = [
        f"the {word} sat on a mat\t{index % 3}" for index, word in enumerate(("cat", "dog", "house", "red", "blue"))
    ]
    (tmp_path / "dev.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    options = {**QUICK, "file": str(tmp_path / "dev.tsv"), "precision": "int8", "keep_all": True}
    built = onnxpress.build(folder, out=tmp_path / "out", **options)
    assert {row["metric"] for row in built.manifest.ledger} == {metric}
