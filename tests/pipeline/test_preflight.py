"""What cannot be is refused before a model is loaded: by build, and by fit before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_decoders import save_decoder
from tiny_models import save_model

import onnxpress
from onnxpress import fit as fit_module
from onnxpress import pipeline, preflight
from onnxpress.cli import main
from onnxpress.errors import InputError, RecipeError, SourceError
from onnxpress.recipe import recipe_of

LONG = "a red dog ran to the blue house and sat on a mat"


class Linear(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    names = {"id2label": {0: "O", 1: "B-PER"}}
    heads: dict[str, tuple[Any, dict[str, Any]]] = {
        "texts": (tf.AutoModelForSequenceClassification, {"num_labels": 3}),
        "tags": (tf.AutoModelForTokenClassification, names),
        "questions": (tf.AutoModelForQuestionAnswering, {}),
    }
    found = {name: save_model(folder / name, "bert", head, **config) for name, (head, config) in heads.items()}
    found["roberta"] = save_model(folder / "roberta", "roberta")
    (folder / "file.onnx").write_bytes(b"never opened")
    return {**found, "language": save_decoder(folder / "language"), "file": folder / "file.onnx", "module": Linear()}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of samples in the current folder."""
    for name, content in {
        "plain.txt": f"the cat sat\n{LONG}\n",
        "other.txt": "the dog\n",
        "fresh.txt": "a blue mat\n",
        "short.csv": "text,label\nthe cat,0\nthe dog,1\n",
        "labelled.csv": f"text,label\n{LONG},0\nthe dog,2\n",
        "unknown.csv": "text,label\nthe cat,0\nthe dog,3\n",
        "alike.csv": "text,label\nthe cat,0\nthe dog,LABEL_0\n",
        "bare.csv": "body\nthe cat\n",
        "marked.csv": "text,mark\nthe cat,0\nthe dog,1\n",
        "fresh.csv": "text\na blue mat\n",
        "unscored.csv": "text,label\nthe cat,good\nthe dog,\n",
        "tags.conll": "the O\ncat B-ANIMAL\n",
    }.items():
        (tmp_path / name).write_text(content)
    samples = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.savez(tmp_path / "labelled.npz", input=samples, labels=np.array([0, 1]))
    np.savez(tmp_path / "some.npz", input=np.float32([[4, 5, 6, 7], [9, 9, 9, 9]]))
    np.savez(tmp_path / "others.npz", input=samples + 100)
    (tmp_path / "broken.npz").write_bytes(b"no arrays")
    monkeypatch.chdir(tmp_path)
    return tmp_path


GPTQ = {"int4-weights": {"method": "gptq"}}
QDQ = {"precision": "int8-qdq"}
PRUNED: dict[str, Any] = {"prune": {"ffn": 0.5}}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        # passes, precisions and targets
        ("texts", {"passes": {"frob": {}}}, "Unknown pass 'frob'"),
        ("texts", {"passes": {"int8": {"frob": 1}}}, "does not take 'frob'"),
        ("texts", {"passes": {"int8": {"smooth": "much"}}}, "smooth is 'much'; it takes numbers, and is 0.0"),
        ("texts", {"passes": {"int8": {"smooth": 1}}}, "smooth is 1.0; it takes 0"),
        ("texts", {"passes": {"int8-qdq": {"smooth": -1}}, **QDQ}, r"smooth is -1.0; it takes 0 \(off\) to below 1"),
        ("texts", {"passes": {"int8": {"percentile": -1}}}, "percentile is -1.0; it takes 90 to 100"),
        ("texts", {"passes": {"fold": {"limit": -1}}}, "a number of elements from 1 on, not -1"),
        ("texts", {"passes": {"int8": {"percentile": 99}}}, "percentile is read where calibration is percentile"),
        ("texts", {"passes": GPTQ}, "a pass that this recipe does not run; it runs: fold, .*int8"),
        ("texts", {"passes": GPTQ, "task": "sentiment-analysis"}, "a pass that this recipe does not run"),
        ("language", {"passes": {"int8": {"smooth": 0.5}}}, "a pass that this recipe does not run"),
        ("language", {"target": "cuda", "precision": "fp32"}, "'fp32' does not go with text-generation"),
        ("language", {"target": "tensorrt"}, "takes no language models"),
        ("language", {"target": "tensorrt", "only": ["fold"]}, "takes no language models"),
        ("language", {"target": "cuda", "cache": "fp32"}, "a cache of fp32 does not go with target 'cuda'"),
        ("texts", {"only": ["sparse-2-4"]}, "sparse-2-4 brings nothing on the target cpu"),
        ("texts", {"only": ["bf16"]}, "CPU provider has no kernels for bf16"),
        ("texts", {"only": ["fold", "fold"]}, "names fold twice"),
        ("texts", {"only": ["int8-cache"]}, "`int8-cache` goes with text-generation, and the task is text-class"),
        ("texts", {"only": ["int8-prompts"]}, "`int8-prompts` goes with text-generation"),
        ("texts", {"precision": "dual"}, "'dual' does not go with text-classification"),
        # what one kind of model has and another has not
        ("texts", {"cache": "fp32"}, "`cache` goes with text-generation"),
        ("texts", {"adapter": "lora"}, "`adapter` goes with text-generation"),
        ("module", {"hidden_states": True}, "`hidden_states` goes with text-generation, and the task is module"),
        ("module", {"max_length": 5}, "`max_length` goes with models that read text"),
        ("file", {"revision": "main"}, "`revision` goes with models that read text"),
        ("texts", {"revision": "main"}, "The revision 'main' was asked for; .*texts is here as it is"),
        ("file", {"example_inputs": (1,)}, "example_inputs and dynamic_axes go with a torch.nn.Module"),
        # a search
        ("texts", {"resume": "notes", "precision": "fp32"}, "--resume keeps what is measured of passes that cost"),
        ("texts", {"budget": "1%", "prefer": "speed", "measure": False}, "nothing is timed here"),
        ("texts", {"budget": "half"}, "The budget 'half' is not understood"),
        ("texts", {"budget": "0.9", "file": "labelled.csv"}, "a value of accuracy, which goes from 0 to 100"),
        ("module", {"budget": "101%"}, "share of variance_kept that may be lost, at most 100%"),
        ("texts", {"prune": {"heads": 4}}, "heads is 4, but there are 4; at least one has to stay"),
        ("texts", {"prune": {"heads": 0.1, "ffn": 0.5}}, "so small a share of 4 heads is none at all"),
        ("texts", {"prune": {"layers": 9}}, "layers is 9, but there are"),
        ("texts", {"prune": {"ffn": 9999}}, "ffn is 9999, but there are"),
        # files
        ("texts", {"file": "bare.csv"}, "no column of texts; it has: body"),
        ("texts", {"file": "tags.conll"}, "files of samples end in"),
        ("texts", {"file": "unknown.csv"}, "does not know the labels '3'; it knows: LABEL_0"),
        ("texts", {"file": "alike.csv"}, "All samples that judge have the label 'LABEL_0', .* two different ones"),
        ("tags", {"file": "tags.conll"}, "does not know the labels 'B-ANIMAL'; it knows: O, B-PER"),
        ("tags", {"file": "labelled.csv"}, "labels of tokens come as lists"),
        ("questions", {"file": "plain.txt"}, "questions need a context each"),
        ("module", {"file": "short.csv"}, "take arrays: give .npz"),
        ("texts", {"columns": {"text": "body"}}, "columns were named, and none of the files given is a table"),
        ("texts", {"columns": {"text": "body"}, "file": "plain.txt"}, "none of the files given is a table"),
        ("language", {"columns": {"label": "label"}, "file": "labelled.csv"}, "column of 'label' was named"),
        ("texts", {"file": "labelled.csv", "calibration": "plain.txt"}, "1 texts of plain.txt are in labelled.csv too"),
        ("texts", {"file": "short.csv", "calibration": "other.txt"}, "1 texts of other.txt are in short.csv too"),
        ("texts", {"calibration": "plain.txt", "precision": "int8-dynamic"}, "Nothing .* calibration file plain.txt"),
        ("language", {"calibration": "plain.txt"}, "choose --precision int8, .*--pass-option int4-weights.method=gptq"),
        (
            "language",
            {"file": "plain.txt", "calibration": "plain.txt", "passes": GPTQ},
            "1 texts of plain.txt are in plain",
        ),
        (
            "module",
            {**QDQ, "file": "labelled.npz", "calibration": "some.npz"},
            "1 samples are both in labelled.npz and in",
        ),
        ("module", {**QDQ, "file": "labelled.npz", "calibration": "broken.npz"}, "broken.npz cannot be read as arrays"),
        # lengths
        ("texts", {"max_length": 41}, "A maximum length of 41 was asked for; .* takes 1 to 40 tokens"),
        ("roberta", {"max_length": 39}, "A maximum length of 39 was asked for; .* takes 1 to 38 tokens"),
        ("language", {"max_length": 4097}, "A maximum length of 4097 was asked for; .* takes 1 to"),
        # pruning and distilling
        ("texts", {**PRUNED, "distil": {"processes": 3}}, "batch_size is 32, which 3 processes cannot share evenly"),
        ("texts", {"prune": {"ffn": 1.0}}, "ffn is 1.0; it takes a share below 1.* or a whole number written without"),
        ("texts", {"prune": {"layers": 1, "multiple": 8}}, "multiple rounds how many channels"),
        ("module", {**PRUNED, "distil": {"epochs": 1}}, "`distil` goes with models that read text"),
        ("texts", {**PRUNED, "distil": {"file": "nowhere.txt"}}, "'nowhere.txt' is no file that exists"),
        ("questions", {**PRUNED, "distil": {"file": "plain.txt"}}, "questions need a context each"),
        ("texts", {**PRUNED, "distil": {"file": "plain.txt", "label_weight": 1.0}}, "labels were asked for"),
        ("texts", {**PRUNED, "distil": {"label_weight": 1.0}}, "labels were asked for"),
        ("texts", {**PRUNED, "distil": {"pieces": 2, "label_weight": 1.0}}, "which have no labels"),
        ("texts", {**PRUNED, "distil": {"file": "unknown.csv", "label_weight": 1.0}}, "know the labels '3'"),
        ("texts", {**PRUNED, "distil": {"columns": {"text": "body"}}}, "none of the files given is a table"),
        ("texts", {**PRUNED, "distil": {"file": "plain.txt"}, "file": "labelled.csv"}, "cannot be judged by them"),
    ],
)
def test_what_cannot_be_is_refused_before_the_export(
    model: str,
    options: dict[str, Any],
    message: str,
    models: dict[str, Any],
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("export", "open_onnx"):
        monkeypatch.setattr(pipeline, name, lambda *_, **__: pytest.fail("the export has begun"))
    inputs: dict[str, Any] = {"example_inputs": (torch.ones(2, 4),)} if model == "module" else {}
    with pytest.raises((RecipeError, InputError, SourceError), match=message):
        onnxpress.build(models[model], out="out", **{"target": "cpu", **inputs, **options})
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("texts", {"file": "labelled.csv", "columns": {"label": "label"}, "calibration": "fresh.txt"}),
        ("texts", {"passes": {"int8": {"calibration": "percentile", "percentile": 99}}}),
        ("texts", {"budget": "95", "file": "labelled.csv"}),
        ("texts", {"budget": "1%", "calibration": "plain.txt", "passes": GPTQ}),
        ("texts", {"precision": "fp32", "calibration": "plain.txt", **PRUNED}),
        # labels that nobody reads: of calibration texts, and of those to learn from
        ("texts", {"file": "marked.csv", "columns": {"label": "mark"}, "calibration": "fresh.csv"}),
        ("tags", {"calibration": "labelled.csv"}),
        ("embeddings", {"calibration": "labelled.csv"}),
        ("embeddings", {**PRUNED, "distil": {"file": "unscored.csv"}}),
        ("language", {"file": "unscored.csv"}),
        ("tags", {"file": "plain.txt"}),
        ("language", {"task": "chat", "passes": GPTQ, "calibration": "plain.txt", "cache": "fp32"}),
        ("module", {"budget": "95", "file": "labelled.npz"}),
        ("module", {**QDQ, "file": "labelled.npz", "calibration": "others.npz"}),
        ("language", {"file": "plain.txt", "calibration": "fresh.txt", "passes": GPTQ}),
    ],
)
def test_what_can_be_is_not_refused(model: str, options: dict[str, Any], models: dict[str, Any], files: Path) -> None:
    found = {"texts": "text-classification", "tags": "token-classification", "language": "text-generation"}
    found["embeddings"] = "feature-extraction"
    source = str(models.get(model, "a folder"))
    recipe = recipe_of(source, {"target": "cpu", **options})
    labels = {"labels": ["a", "b", "c"], "problem_type": "single_label_classification"}
    preflight.check(recipe, found.get(model, "module"), labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "0.9"}, "a value of accuracy, which goes from 0 to 100 with labels"),
        ({"cache": "int8"}, "`cache` goes with text-generation"),
        ({"adapter": "lora"}, "`adapter` goes with text-generation"),
        ({"calibration": "plain.txt", "precision": "int8-dynamic"}, "Nothing .* look at the calibration file"),
        ({"calibration": "bare.csv"}, "no column of texts"),
        ({"budget": "1%", "prefer": "speed", "measure": False}, "nothing is timed here"),
        ({"passes": GPTQ}, "a pass that this recipe does not run"),
    ],
)
def test_fit_refuses_before_it_trains(
    options: dict[str, Any], message: str, models: dict[str, Any], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "fit_samples", lambda *_, **__: pytest.fail("training has begun"))
    with pytest.raises(RecipeError, match=message):
        fit_module.fit(models["texts"], "short.csv", out="out", target="cpu", **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "-3%"], "The budget '-3%' is not understood"),
        (["--max-length", "-5"], "'model.max_length': input should be greater than or equal to 1, not -5"),
        (["--prune", "ffn=1.0"], "prune: ffn is 1.0; it takes a share below 1"),
        (["--prune", "ffn=0.5,ffn=0.2"], "--prune: ffn is given twice"),
        (["--prune", "ffn=0.5", "--pass-option", "prune.ffn=2"], "--prune: ffn is given twice"),
        (["--pass-option", "int8.smooth=0", "--pass-option", "int8.smooth=1"], "--pass-option int8: smooth is given"),
        (["--column", "text=a", "--column", "text=b"], "--column: text is given twice"),
        (["--resume", "notes", "--precision", "fp32"], "--resume keeps what is measured"),
        (["--hidden-states"], "`hidden_states` goes with text-generation"),
    ],
)
def test_the_command_line_says_it_in_one_sentence(
    arguments: list[str], message: str, models: dict[str, Any], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(models["texts"]), "--target", "cpu", "--out", "out", "--json", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("onnxpress: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 trains on CUDA")
def test_training_that_this_machine_cannot_do(models: dict[str, Any], files: Path) -> None:
    with pytest.raises(InputError, match="fp16 needs a CUDA device"):
        onnxpress.build(models["texts"], out="out", target="cpu", **PRUNED, distil={"precision": "fp16"})
    with pytest.raises(InputError, match="fp16 needs a CUDA device"):
        fit_module.fit(models["texts"], "short.csv", out="out", target="cpu", autocast="fp16")
    assert not Path("out").exists()


def test_under_a_launcher_one_error_and_no_file(
    models: dict[str, Any], files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = sorted(files.rglob("*"))
    assert main(["build", str(models["texts"]), "--out", "out"]) == 2
    assert "started in 2 processes by a launcher" in capsys.readouterr().err
    assert main(["fit", str(models["texts"]), "--train", "short.csv", "--out", "out"]) == 2
    assert "fit: --processes 2" in capsys.readouterr().err
    assert sorted(files.rglob("*")) == before
