"""Whole builds that prune and distil: one recipe, one artifact, its ledger; and one clear error for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_decoders import save_decoder
from tiny_models import WORDS, save_model

import onnxpress
from onnxpress.cli import main
from onnxpress.errors import BudgetError, ConversionError, InputError, OutputError, RecipeError
from onnxpress.exporters.quiet import quiet
from onnxpress.recipe import make_recipe, read_recipe, with_options

QUICK = {"measure": False, "samples": 24, "calibration_samples": 16}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "classifier"
    return save_model(folder, "bert", tf.AutoModelForSequenceClassification, num_labels=3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    lines = [" ".join(random.choice(WORDS, random.integers(3, 12))) for _ in range(400)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_prune_distil_quantize_is_one_recipe(classifier: Path, texts: Path, tmp_path: Path) -> None:
    others = tmp_path / "others.csv"
    random = np.random.default_rng(1)
    others.write_text("text\n" + "\n".join(" ".join(random.choice(WORDS, 8)) for _ in range(40)), encoding="utf-8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[model]\nsource = "{classifier}"\n[build]\nprecision = "int8"\nkeep_all = true\nmeasure = false\n'
        '[quality]\nsamples = 40\ncalibration_samples = 16\nfile = "others.csv"\n'
        "[prune]\nffn = 0.5\nheads = 1\nmultiple = 8\n"
        f'[distil]\nfile = "{texts}"\nepochs = 6\nlearning_rate = 1e-3\n'
    )
    built = onnxpress.build(recipe, out=tmp_path / "out")
    rows = {row["pass"]: row for row in built.manifest.ledger}
    assert [name for name in rows if name in ("export", "prune", "int8")] == ["export", "prune", "int8"]
    assert rows["prune"]["status"] == "kept"
    assert rows["prune"]["bytes"] < rows["export"]["bytes"]
    notes = " ".join(rows["prune"]["notes"])
    assert "distilled on 400 examples, 6 epochs" in notes
    before, after = map(float, notes.partition("divergence ")[2].split()[:3:2])
    assert after < 0.7 * before
    undistilled = onnxpress.build(recipe, out=tmp_path / "plain", distil={"epochs": 1, "learning_rate": 1e-9})
    plain = {row["pass"]: row for row in undistilled.manifest.ledger}["prune"]
    assert rows["prune"]["metrics"]["kl_mean"] < plain["metrics"]["kl_mean"]
    answers = onnxpress.load(built.path).predict(["the cat sat on a mat"])
    assert len(answers) == 1


def test_pruned_without_training_and_the_same_bytes_twice(classifier: Path, tmp_path: Path) -> None:
    options = {"prune": {"layers": 1}, "precision": "fp32", "keep_all": True, **QUICK}
    one = onnxpress.build(classifier, out=tmp_path / "one", **options)
    other = onnxpress.build(classifier, out=tmp_path / "other", **options)
    assert one.manifest.operators["Attention"] == 1
    assert one.manifest.files == other.manifest.files
    assert one.manifest.recipe["prune"]["layers"] == 1


@pytest.mark.newest
def test_a_language_model_generates_with_fewer_heads_and_layers(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "model", num_hidden_layers=3)
    built = onnxpress.build(
        folder,
        out=tmp_path / "out",
        prune={"heads": 1, "layers": 1, "ffn": 0.33},
        precision="fp32",
        keep_all=True,
        **QUICK,
    )
    caches = [spec.shape[1] for spec in built.manifest.signature.inputs if spec.name.startswith("past_key_values")]
    assert caches == [1, 1, 1, 1]
    generator = onnxpress.load(built.path)
    assert len(generator.generate(["the cat"], max_new_tokens=5, ignore_eos=True)[0].token_ids) == 5


def test_a_plain_module_and_an_onnx_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    example = (torch.randn(4, 16),)
    options = {"prune": {"ffn": 0.25}, "precision": "fp32", "keep_all": True, **QUICK}
    built = onnxpress.build(module, example_inputs=example, out=tmp_path / "module", **options)
    assert module[0].out_features == 64
    pruned = {row["pass"]: row for row in built.manifest.ledger}["prune"]
    assert pruned["bytes"] == pruned["bytes_before"] - 4 * 32 * 33, "a row, a column and a bias for each of 32 channels"
    file = built.path / "model.onnx"
    again = onnxpress.build(str(file), out=tmp_path / "file", **options)
    row = {row["pass"]: row for row in again.manifest.ledger}["prune"]
    assert "million numbers became" in row["notes"][0]
    assert row["bytes"] < row["bytes_before"]
    with pytest.raises(RecipeError, match="`distil` goes with models that read text, built from PyTorch"):
        onnxpress.build(str(file), out=tmp_path / "no", distil={"epochs": 1}, **options)
    with pytest.raises(RecipeError, match="`distil` goes with models that read text, built from PyTorch"):
        onnxpress.build(module, example_inputs=example, out=tmp_path / "no", distil={"epochs": 1}, **options)
    assert not (tmp_path / "no").exists()


class Twice(torch.nn.Module):
    """Two layers that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 128), torch.nn.Linear(128, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return x


def test_layers_of_a_file_that_share_weights_go_on_sharing_them(tmp_path: Path) -> None:
    """PyTorch's exporter writes a weight that is used twice two times."""
    torch.manual_seed(0)
    path = tmp_path / "twice.onnx"
    with quiet():
        batch = torch.export.Dim("batch", min=1, max=64)
        torch.onnx.export(Twice().eval(), (torch.randn(2, 5, 16),), path, dynamic_shapes=({0: batch},), verbose=False)
    assert path.stat().st_size + sum(item.stat().st_size for item in tmp_path.glob("*.data")) > 2 * 4 * 2 * 16 * 128
    options = {"prune": {"ffn": 0.5}, "precision": "fp32", "keep_all": True, **QUICK}
    built = onnxpress.build(str(path), out=tmp_path / "out", **options)
    row = {row["pass"]: row for row in built.manifest.ledger}["prune"]
    assert any(note.startswith("ffn: 1 places") for note in row["notes"])
    assert row["bytes"] < 4 * (2 * 16 * 64 + 3 * 64 + 16) + 200, "one copy of each weight, half as wide"


@pytest.mark.newest
def test_a_module_that_cannot_be_made_as_small_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    """CodeGen's heads stand in four groups, which its code has as a number."""
    folder, texts = save_decoder(tmp_path / "model", "codegen"), tmp_path / "texts.txt"
    texts.write_text("a text to learn from\n" * 30, encoding="utf-8")
    with pytest.raises(
        ConversionError, match="made as small as its pruned graph, the PyTorch module answers otherwise"
    ):
        onnxpress.build(folder, out=tmp_path / "out", prune={"heads": 1}, distil={"file": str(texts)}, **QUICK)
    assert not (tmp_path / "out").exists()


def test_a_budget_that_the_pruned_model_does_not_meet(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "encoder", "bert")
    with pytest.raises(BudgetError, match=r"The pruned model is not good enough: cosine_mean 0\.\d+.*Prune less"):
        onnxpress.build(folder, out=tmp_path / "out", prune={"ffn": 0.5, "multiple": 1}, budget="0.99999", **QUICK)
    assert not (tmp_path / "out").exists()
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    given: dict[str, Any] = {"example_inputs": (torch.randn(4, 16),), "prune": {"ffn": 0.5}, "measure": False}
    with pytest.raises(BudgetError, match=r"Prune less, allow more with --budget"):  # no text to distil from
        onnxpress.build(plain, out=tmp_path / "out", **given)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"distil": {"epochs": 1}}, RecipeError, r"\[distil\] trains what \[prune\] made smaller"),
        (
            {"prune": {"ffn": 0.5, "width": 3}},
            RecipeError,
            r"unknown key 'prune.width' \(allowed here: ffn, heads, layers",
        ),
        ({"prune": {"heads": 12}}, RecipeError, "heads is 12, but there are 4"),
        ({"prune": {"ffn": -1}}, RecipeError, "prune: ffn is"),
        ({"prune": 0.5}, RecipeError, r"prune is 0.5; it takes a dict"),
        ({"prune": {}}, RecipeError, "nothing is to go; set ffn, heads or layers"),
        ({"prune": {"ffn": 0.5}, "distil": {"file": "nowhere.txt"}}, RecipeError, "nowhere.txt"),
        ({"prune": {"ffn": float("inf")}}, RecipeError, "prune: ffn is"),
        (
            {"prune": {"ffn": 0.5}, "distil": {"processes": 3}},
            RecipeError,
            "distil: batch_size is 32, which 3 processes cannot share evenly",
        ),
        ({"prune": {"ffn": 1.5}}, RecipeError, "ffn is 1.5; it takes a share below 1"),
        (
            {"prune": {"ffn": 0.5}, "distil": {"checkpoints": "artifacts/x/c"}, "out": "artifacts/x"},
            RecipeError,
            "inside of",
        ),
    ],
)
def test_mistakes(
    options: dict[str, object], error: type[Exception], said: str, classifier: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        onnxpress.build(classifier, **{"out": tmp_path / "out", **options}, **QUICK)
    assert not (tmp_path / "out").exists()


def test_checkpoints_are_for_the_same_recipe_alone(classifier: Path, texts: Path, tmp_path: Path) -> None:
    """That a training which was killed comes to the same weights is test_training's and test_distil's."""
    checkpoints = tmp_path / "checkpoints"
    options = {"prune": {"ffn": 0.5}, "precision": "fp32", "keep_all": True, **QUICK}
    distil = {"file": str(texts), "checkpoints": str(checkpoints), "epochs": 1}
    onnxpress.build(classifier, out=tmp_path / "one", distil=distil, **options)
    again = onnxpress.build(classifier, out=tmp_path / "other", distil=distil, **options)
    assert {row["pass"]: row for row in again.manifest.ledger}["prune"]["status"] == "kept"
    with pytest.raises(InputError, match="cannot be resumed with another"):
        onnxpress.build(classifier, out=tmp_path / "no", distil={**distil, "temperature": 3.0}, **options)
    assert not (tmp_path / "no").exists()


def test_a_folder_that_can_hold_no_checkpoints_is_refused_before_anything_is_done(
    classifier: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxpress.pipeline.export", lambda *_, **__: pytest.fail("it was exported first"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("kept")
    for folder, said in (("mine", "not empty, and holds no training"), ("mine/letter.txt", "cannot be written")):
        distil = {"file": str(texts), "checkpoints": str(tmp_path / folder)}
        with pytest.raises(OutputError, match=said):
            onnxpress.build(classifier, out=tmp_path / "out", prune={"ffn": 0.5}, distil=distil, **QUICK)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_texts_that_judge_are_not_learned_from(classifier: Path, tmp_path: Path) -> None:
    file = tmp_path / "same.csv"
    lines = [" ".join(np.random.default_rng(seed).choice(WORDS, 12)) for seed in range(9)]
    file.write_text("text\n" + "\n".join(lines), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"9 texts of .* cannot be judged by them"):
        onnxpress.build(
            classifier, out=tmp_path / "out", prune={"ffn": 0.5}, distil={"file": str(file)}, file=str(file), **QUICK
        )


def test_paths_of_a_recipe_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        '[model]\nsource = "x"\n[prune]\nffn = 0.5\n[distil]\nfile = "texts.txt"\ncheckpoints = "here"\n'
    )
    plain = tmp_path / "plain.toml"
    plain.write_text('[model]\nsource = "x"\n')
    more = with_options(read_recipe(plain), {"prune": {"ffn": 0.5}, "distil": {"epochs": 2}})
    assert more.distil is not None
    assert more.distil.epochs == 2
    distil = read_recipe(tmp_path / "recipe.toml").distil
    assert distil is not None
    assert distil.file == str(tmp_path / "texts.txt")
    assert distil.checkpoints == str(tmp_path / "here")
    assert make_recipe({"model": {"source": "x"}}).prune is None


def test_from_the_command_line(
    classifier: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build", str(classifier), "--out", str(tmp_path / "out"), "--no-measure", "--keep-all", "--json"]
    more = ["--prune", "ffn=0.5,layers=1", "--distil", str(texts), "--pass-option", "distil.epochs=1"]
    processes = [] if torch.accelerator.is_available() else ["--pass-option", "distil.processes=2"]
    assert main([*arguments, *more, *processes]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "out")
    assert main([*arguments, "--prune", "half"]) == 2
    assert "is not of the form PART=SHARE" in capsys.readouterr().err
