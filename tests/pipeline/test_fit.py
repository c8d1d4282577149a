"""Fitting: from a few labels to a proven artifact, for every kind of label, and one clear error for what cannot be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from interrupting import interrupt_rename
from tiny_models import CONFIGS, add_pooling, save_model, save_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import onnxpress
from onnxpress.artifact import Artifact
from onnxpress.cli import main
from onnxpress.engine import Engine
from onnxpress.errors import InputError, OutputError, RecipeError, SourceError
from onnxpress.fit import (
    _accuracy,
    _balanced_accuracy,
    _check_checkpoint_folder,
    _write_whole,
    fit,
    fit_samples,
    torch_runner,
)
from onnxpress.labelled import find_labels, labelled_samples, normalized, read_labelled, split, told
from onnxpress.optimizers.training import TrainingOptions

FAST: dict[str, Any] = {
    "epochs": 6,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "precision": "int8-dynamic",
    "measure": False,
}
FROZEN: dict[str, Any] = {"frozen_encoder": True, "precision": "int8-dynamic", "measure": False}


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def plain_model(folder: Path) -> Path:
    """Initial weights: vectors of tokens are near to their embeddings, so that a head on them can tell words."""
    torch.manual_seed(7)
    tf.AutoModel.from_config(CONFIGS["bert"]()).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_model(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = plain_model(tmp_path_factory.mktemp("model") / "sentences")
    add_pooling(folder, ("Pooling", {"pooling_mode": "mean"}), ("Normalize", None))
    return folder


def animals(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Whether a text is of a cat or of a dog, at unequal lengths."""
    generator = np.random.default_rng(seed)
    texts, labels = [], []
    for index in range(count):
        words = list(generator.choice(["the", "sat", "on", "a", "mat", "ran", "house"], size=generator.integers(1, 6)))
        words.insert(int(generator.integers(0, len(words) + 1)), "cat" if index % 2 else "dog")
        texts.append(" ".join(words))
        labels.append("feline" if index % 2 else "canine")
    return texts, labels


def write(path: Path, texts: list[str], labels: list[Any]) -> Path:
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def check_artifact_is_what_was_trained(folder: Path, runner: Any, texts: list[Any]) -> None:
    """The checkpoint in PyTorch and the artifact agree, as far as its precision allows."""
    facts = json.loads((folder / "fit.json").read_text())
    original = torch_runner(folder, facts["task"], max_length=facts["max_length"])
    for one, other in zip(original.outputs(texts), runner.outputs(texts), strict=True):
        np.testing.assert_allclose(one["logits"], other["logits"], rtol=1e-3, atol=1e-4)


def test_full_training_gives_a_proven_artifact(model: Path, tmp_path: Path) -> None:
    train, dev = write(tmp_path / "train.jsonl", *animals(128)), write(tmp_path / "dev.jsonl", *animals(30, seed=9))
    fitted = fit(model, train, evaluation=dev, out=tmp_path / "out", **FAST | {"precision": "fp32"})
    manifest = fitted.artifact.manifest
    assert manifest.options["labels"] == ["canine", "feline"]
    assert (manifest.ledger[0]["metric"], manifest.ledger[0]["quality"]) == (
        "accuracy",
        pytest.approx(100 * max(entry["accuracy"] for entry in fitted.facts["evaluations"]), abs=1e-3),
    )
    assert manifest.ledger[0]["quality"] > 90
    runner: Any = onnxpress.load(tmp_path / "out")
    assert [answer["label"] for answer in runner.predict(["a dog ran", "the cat"])] == ["canine", "feline"]
    check_artifact_is_what_was_trained(fitted.checkpoint, runner, animals(9, seed=2)[0])
    again = tf.AutoModelForSequenceClassification.from_pretrained(fitted.checkpoint)
    assert again.config.id2label == {0: "canine", 1: "feline"}
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "dev.jsonl", "out", "out-checkpoint"}
    assert not (fitted.checkpoint / "training").exists()


@pytest.mark.parametrize("pooled", [False, True])
def test_a_frozen_encoder_gives_an_ordinary_classifier(
    model: Path, sentence_model: Path, tmp_path: Path, pooled: bool
) -> None:
    source = sentence_model if pooled else model
    train = write(tmp_path / "train.jsonl", *animals(80))
    fitted = fit(source, train, out=tmp_path / "out", **FROZEN | {"precision": "fp32"})
    assert "8 of 80 samples were held out for evaluation" in fitted.facts["notes"]
    assert fitted.artifact.manifest.ledger[0]["quality"] == 100.0
    runner: Any = onnxpress.load(tmp_path / "out")
    check_artifact_is_what_was_trained(fitted.checkpoint, runner, animals(9, seed=2)[0])
    # The head that was fitted is the one that answers: scikit-learn's own probabilities, by hand from the encoder.
    encoder = tf.AutoModel.from_pretrained(source).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(["the cat sat on a mat"], return_tensors="pt", return_token_type_ids=True)
    with torch.no_grad():
        vector = encoder(**inputs)["last_hidden_state"].mean(1)[0].numpy()
    from safetensors.numpy import load_file

    head = load_file(fitted.checkpoint / "2_Dense" / "model.safetensors")
    logits = head["linear.weight"] @ vector + head["linear.bias"]
    got = runner.outputs(["the cat sat on a mat"])[0]["logits"]
    np.testing.assert_allclose(got, logits, rtol=1e-3, atol=1e-3)
    rebuilt = onnxpress.build(fitted.checkpoint, out=tmp_path / "again", precision="fp32", measure=False)
    assert rebuilt.manifest.task == "text-classification"  # told from the folder alone
    assert rebuilt.manifest.options["labels"] == ["canine", "feline"]


def test_a_frozen_head_reads_whole_embeddings(sentence_model: Path, tmp_path: Path) -> None:
    """Also where the folder keeps their first numbers alone, and scales them before."""
    folder = Path(shutil.copytree(sentence_model, tmp_path / "model"))
    (folder / "config_sentence_transformers.json").write_text('{"truncate_dim": 8}')
    texts, names = animals(128)
    facts = [
        fit_samples(
            source, labelled_samples(texts, names), None, folder=tmp_path / name, frozen_encoder=True,
            training=TrainingOptions(),
        )
        for name, source in (("whole", sentence_model), ("cut", folder))
    ]  # fmt: skip
    assert facts[0]["evaluation_loss"] == facts[1]["evaluation_loss"]
    one, other = (torch_runner(tmp_path / name, "text-classification", max_length=16) for name in ("whole", "cut"))
    assert one.answer_texts(texts[:5]) == other.answer_texts(texts[:5])


def test_a_frozen_head_on_a_trained_head_takes_its_place(sentence_model: Path, tmp_path: Path) -> None:
    texts, labels = animals(40)
    samples = labelled_samples(texts, labels)
    options = TrainingOptions()
    fit_samples(sentence_model, samples, None, folder=tmp_path / "one", frozen_encoder=True, training=options)
    fit_samples(tmp_path / "one", samples, None, folder=tmp_path / "two", frozen_encoder=True, training=options)
    one, two = (
        torch_runner(tmp_path / name, "text-classification", max_length=40).outputs(texts) for name in ("one", "two")
    )
    for first, second in zip(one, two, strict=True):
        np.testing.assert_allclose(first["logits"], second["logits"], rtol=1e-4, atol=1e-4)
    with pytest.raises(SourceError, match="linear head"):
        fit_samples(tmp_path / "one", samples, None, folder=tmp_path / "three", training=options)
    assert not (tmp_path / "three").exists()


def test_several_labels_a_text(model: Path, tmp_path: Path) -> None:
    texts, _ = animals(200)
    labels = [[name for name in ("cat", "mat", "ran") if name in text.split()] for text in texts]
    train = write(tmp_path / "train.jsonl", texts, labels)
    fitted = fit(model, train, out=tmp_path / "out", **FAST | {"precision": "fp32"})
    assert fitted.artifact.manifest.options["problem_type"] == "multi_label_classification"
    assert fitted.artifact.manifest.ledger[0]["metric"] == "f1"
    frozen = fit(model, train, out=tmp_path / "frozen", **FROZEN | {"precision": "fp32"})
    assert frozen.artifact.manifest.ledger[0]["quality"] > 80
    runner: Any = onnxpress.load(tmp_path / "frozen")
    scores = runner.predict(["cat mat"])[0]["scores"]
    assert min(scores["cat"], scores["mat"]) > 0.5 > scores["ran"]


def test_a_zero_or_one_for_each_label_is_not_taken_for_names() -> None:
    kind = "multi-label-classification"
    with pytest.raises(InputError, match=r"\[1, 1, 0, 1\] are no names, or one is there twice"):
        normalized(labelled_samples(["a", "b"], [[0, 1], [1, 1, 0, 1]]), kind)
    assert normalized(labelled_samples(["a"], [[3, 7]]), kind)[0].label == ["3", "7"]
    with pytest.raises(InputError, match=r"A label is empty\."):
        normalized(labelled_samples(["a", "b"], ["x", ""]), "text-classification")


def test_to_evaluate_an_artifact_needs_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "bert", tf.AutoModelForSequenceClassification, num_labels=2)
    built = onnxpress.build(folder, out=tmp_path / "out", precision="fp32", measure=False, samples=24)
    engine = onnxpress.Engine.load(built.path)
    names = built.manifest.options["labels"]
    assert set(engine.evaluate(["a cat", "a dog"], names)) == {"accuracy", "f1_macro"}
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(InputError, match=r"the package sklearn.* is needed: pip install 'onnxpress\[build\]'"):
        engine.evaluate(["a cat", "a dog"], names)


def test_several_labels_in_a_column(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\na cat on a mat,cat|mat\nnothing,|\na mat,mat\n")
    kind = "multi-label-classification"
    samples = normalized(read_labelled(path, kind), kind)
    assert [sample.label for sample in samples] == [["cat", "mat"], [], ["mat"]]
    assert find_labels(samples, kind).names == ("cat", "mat")


def test_numbers(model: Path, tmp_path: Path) -> None:
    texts, _ = animals(120)
    train = write(tmp_path / "train.jsonl", texts, [len(text.split()) + 0.5 for text in texts])
    fitted = fit(model, train, out=tmp_path / "out", **FROZEN | {"precision": "fp32"})
    assert fitted.artifact.manifest.options["problem_type"] == "regression"
    assert (fitted.artifact.manifest.ledger[0]["metric"], fitted.facts["kind"]) == ("spearman", "regression")
    assert fitted.artifact.manifest.ledger[0]["quality"] > 80
    texts, names = animals(128)
    samples = labelled_samples(texts, [0.5 if name == "canine" else 2.5 for name in names])
    reranker = Path(shutil.copytree(model, tmp_path / "reranker"))
    config = json.loads((reranker / "config.json").read_text())
    declared = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}
    (reranker / "config.json").write_text(json.dumps(config | declared))
    facts = fit_samples(
        reranker, samples, None, folder=tmp_path / "full",
        training=TrainingOptions(epochs=8, batch_size=8, learning_rate=2e-3),
    )  # fmt: skip
    assert max(entry["r2"] for entry in facts["evaluations"]) > 0.5
    assert "sentence_transformers" not in json.loads((tmp_path / "full" / "config.json").read_text())
    with pytest.raises(InputError, match="All samples that judge have the same score"):
        Engine.load(model).fit(texts[:9], [0.5, 2.5, 1.5] * 3, evaluation=(texts[9:11], [1.5, 1.5]))
    with pytest.raises(InputError, match=r"keeps no checkpoints, so that there is no resume; `onnxpress fit"):
        Engine.load(model).fit(texts[:9], [0.5, 2.5, 1.5] * 3, resume=True)


def test_tags_of_tokens(model: Path, tmp_path: Path) -> None:
    def conll(path: Path, count: int, seed: int) -> Path:
        texts, _ = animals(count, seed)
        tag = {"cat": "B-ANIMAL", "dog": "B-ANIMAL", "house": "B-PLACE"}
        path.write_text(
            "\n\n".join("\n".join(f"{word}\t{tag.get(word, 'O')}" for word in text.split()) for text in texts)
        )
        return path

    train, dev = conll(tmp_path / "train.conll", 100, 0), conll(tmp_path / "dev.conll", 20, 5)
    processes = 1 if torch.accelerator.is_available() else 2  # each takes a device where there are any
    fitted = fit(
        model, train, evaluation=dev, out=tmp_path / "out", processes=processes, **FAST | {"precision": "fp32"}
    )
    assert fitted.facts["training"]["processes"] == processes
    manifest = fitted.artifact.manifest
    assert (manifest.task, manifest.options["labels"]) == (
        "token-classification",
        ["O", "B-ANIMAL", "B-PLACE", "I-ANIMAL", "I-PLACE"],
    )
    assert (manifest.ledger[0]["metric"], manifest.ledger[0]["quality"]) == ("entity_f1", 100.0)
    runner: Any = onnxpress.load(tmp_path / "out")
    assert [(item["entity"], item["text"]) for item in runner.predict(["a dog ran to the house"])[0]] == [
        ("ANIMAL", "dog"), ("PLACE", "house"),
    ]  # fmt: skip
    with pytest.raises(InputError, match="needs full training"):
        fit(model, train, out=tmp_path / "frozen", **FROZEN)


def test_pairs_of_texts(model: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    pairs = [tuple(generator.choice(["cat", "dog"], 2)) for _ in range(64)]
    engine = Engine.load(model).fit(
        [[f"the {first} sat", f"a {second}"] for first, second in pairs],  # as JSON has them
        ["same" if first == "cat" else "other" for first, _ in pairs],
        epochs=8, batch_size=8, learning_rate=3e-3,
    )  # fmt: skip
    assert engine.facts["evaluations"][-1]["accuracy"] == 1.0
    scores = engine.predict([("the cat sat", "a dog"), ("the dog sat", "a cat")])
    assert scores[0]["same"] > 0.5 > scores[1]["same"]
    assert engine.predict([["the cat sat", "a dog"]]) == scores[:1]


def test_chinese_without_spaces(tmp_path: Path) -> None:
    """A vocabulary of characters, as BERT's for Chinese is."""
    folder = plain_model(tmp_path / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"这家餐馆很好吃难极了服务差满意我不喜欢"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    texts = ["这家餐馆很好吃", "服务满意", "我很喜欢", "好极了", "这家餐馆很难吃", "服务差极了", "我不喜欢", "差"] * 4
    labels = (["好"] * 4 + ["坏"] * 4) * 4
    engine = Engine.load(folder).fit(texts, labels, evaluation=(texts, labels), frozen_encoder=True)
    assert engine.evaluate(texts, labels)["accuracy"] == 100.0
    assert engine.predict(["这家服务难极了"])[0].keys() == {"好", "坏"}


def test_engine_from_fit_to_a_device(sentence_model: Path, tmp_path: Path) -> None:
    texts, labels = animals(60)
    engine = Engine.load(sentence_model)
    with pytest.raises(InputError, match="no task 'sentiment' to fit; there are: text-classification"):
        Engine.load(sentence_model, task="sentiment")
    with pytest.raises(InputError, match="fit it first"):
        engine.predict(["a cat"])
    with pytest.raises(InputError, match="nothing to save"):
        engine.save(tmp_path / "out")
    engine.fit(texts, labels, frozen_encoder=True)
    before = engine.predict(["the cat sat", "dog"])
    assert all(abs(sum(row.values()) - 1) < 1e-9 for row in before)
    artifact = engine.save(tmp_path / "out", precision="fp32", measure=False)
    assert artifact.manifest.name == "out"
    for one, other in zip(before, engine.predict(["the cat sat", "dog"]), strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    # On a device without torch, transformers and the rest.
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'pydantic', 'sklearn', 'scipy'): sys.modules[name] = None\n"
        "import onnxpress\n"
        f"engine = onnxpress.Engine.load({str(tmp_path / 'out')!r})\n"
        "print(max(*engine.predict(['the cat sat'])[0].items(), key=lambda item: item[1])[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("feline", "")
    loaded = Engine.load(tmp_path / "out")
    assert loaded.evaluate(*animals(20, seed=3))["accuracy"] == 100.0
    with pytest.raises(InputError, match=r"does not know the labels '7', 'bird'; it knows: canine, feline"):
        loaded.evaluate(["a cat", "a bird", "a dog"], ["feline", "bird", 7])
    with pytest.raises(InputError, match="cannot be trained"):
        loaded.fit(texts, labels)


def test_labels_that_the_engine_does_not_know_are_an_error(tmp_path: Path) -> None:
    labels = ["O", "B-ANIMAL", "I-ANIMAL"]
    folder = save_model(tmp_path / "tags", "bert", tf.AutoModelForTokenClassification, id2label=dict(enumerate(labels)))
    built = onnxpress.build(folder, out=tmp_path / "out", precision="fp32", measure=False, samples=8)
    engine = Engine.load(built.path)
    words = ["the", "cat", "sat"]
    assert set(engine.evaluate([words], [["O", "B-ANIMAL", "O"]])) >= {"entity_f1"}
    with pytest.raises(
        InputError, match=r"does not know the labels 'B-BIRD', 'I-TREE'; it knows: O, B-ANIMAL, I-ANIMAL"
    ):
        engine.evaluate([words, words], [["B-BIRD", "O", "O"], ["O", "I-TREE", "B-ANIMAL"]])
    with pytest.raises(InputError, match="The tag 'ANIMAL' is not understood"):
        engine.evaluate([words], [["O", "ANIMAL", "O"]])
    with pytest.raises(InputError, match="needs tokens and tags"):
        engine.evaluate(["the cat sat"], ["ANIMAL"])
    with pytest.raises(InputError, match="is an artifact for token-classification, not for regression"):
        Engine.load(built.path, task="regression")
    assert Engine.load(built.path, task="token-classification").predict(["the cat"])


def test_cut_texts_are_counted(model: Path, tmp_path: Path) -> None:
    texts, labels = animals(40)
    samples = labelled_samples([*texts, "cat " * 60], [*labels, "feline"])
    facts = fit_samples(
        model, samples, samples[:40], folder=tmp_path / "one", frozen_encoder=True, training=TrainingOptions()
    )
    assert facts["notes"][-1] == "1 of 41 training texts were cut at 40 tokens"


def test_balanced_weights_find_rare_labels(model: Path) -> None:
    texts, labels = animals(100)
    keep = [index for index in range(100) if labels[index] == "canine" or index % 12 == 1]
    samples = labelled_samples([texts[index] for index in keep], [labels[index] for index in keep])

    def tilt(folder: Path, balanced: bool) -> float:
        facts = fit_samples(
            model, samples, samples, folder=folder, balanced=balanced,
            training=TrainingOptions(epochs=1, batch_size=4, learning_rate=1e-2),
        )  # fmt: skip
        assert ("labels are uneven" in " ".join(facts["notes"])) is not balanced
        runner: Any = torch_runner(folder, "text-classification", max_length=40)
        return float(np.mean([answer["scores"]["feline"] for answer in runner.predict(texts)]))

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        assert tilt(Path(folder) / "balanced", True) > tilt(Path(folder) / "plain", False) + 0.1


def test_tokens_that_the_tokenizer_cuts_are_learned_whole(model: Path, tmp_path: Path) -> None:
    """E-mail addresses, dates: of several words to the tokenizer, and one token of the samples, which never have an I- tag."""
    texts, _ = animals(100)
    tokens = [[*text.split(), "cat.dog"] for text in texts]
    tags = [[*("O" for _ in text.split()), "B-ODD"] for text in texts]
    labels = find_labels(labelled_samples(tokens, tags), None)
    assert labels.names == ("O", "B-ODD", "I-ODD")
    engine = Engine.load(model)
    engine.fit(tokens, tags, evaluation=(tokens[:20], tags[:20]), epochs=10, batch_size=8, learning_rate=3e-3)
    assert engine.evaluate(tokens[:20], tags[:20])["entity_f1"] > 90  # 0 where only the first word is asked for


def test_the_best_epoch_of_a_balanced_training_is_one_that_tells_the_rare_label() -> None:
    logits = np.array([[2.0, 1.0]] * 20)
    gold = np.array([0] * 19 + [1])
    assert _accuracy(logits, gold) == 0.95
    assert _balanced_accuracy(logits, gold) == 0.5
    told = logits.copy()
    told[10:] = told[10:, ::-1]
    assert _accuracy(told, gold) < 0.95
    assert _balanced_accuracy(told, gold) > 0.75


def test_the_command_line_and_a_resume(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"{int(label == 'feline')} {text}" for text, label in zip(*animals(40), strict=True)]
    (tmp_path / "words.train").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    command = ["fit", str(model), "--train", "words.train", "--out", "out", "--epochs", "3", "--batch-size", "8",
               "--learning-rate", "0.003", "--precision", "fp32", "--no-measure", "--budget", "50%", "--json"]  # fmt: skip
    from onnxpress.exporters import trainable

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainable, "save_trained", killed)
        assert main(command) == 130
    assert not (tmp_path / "out").exists()
    assert {path.name for path in (tmp_path / "out-checkpoint").iterdir()} == {"training"}
    assert not list(tmp_path.glob(".*"))
    assert main(command) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert main([*command, "--resume", "--seed", "1"]) == 2
    assert "cannot be resumed" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["training"]["labels"] == ["0", "1"]
    assert shown["manifest"]["ledger"][0]["metric"] == "accuracy"
    for again in ([*command, "--resume", "--seed", "1"], command):
        assert main(again) == 2
        said = capsys.readouterr().err
        assert "onnxpress build out-checkpoint --eval out-checkpoint/evaluation.jsonl --max-length 40 makes" in said
    digests = Artifact.open(tmp_path / "out").manifest.files
    shutil.rmtree(tmp_path / "out")  # as after a kill between the training and the artifact's end
    assert main([*command, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["labels"] == ["0", "1"]
    assert Artifact.open(tmp_path / "out").manifest.files == digests
    build = ["build", "out-checkpoint", "--eval", "out-checkpoint/evaluation.jsonl", "--budget", "50%"]
    assert main([*build, "--out", "again", "--precision", "fp32", "--no-measure"]) == 0
    assert main([*command, "--resume", "--checkpoint", "none"]) == 2
    assert "no interrupted training in none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "labels", "kind", "message"),
    [
        (["a"] * 9, ["x"] * 8, None, "9 texts and 8 labels"),
        ([], [], None, "No texts"),
        ("a cat", ["x"], None, "A list of texts"),
        (["a", "b", "c"], "pos", None, "A list of labels is expected, not a str"),
        (["a", "b"], (name for name in "xy"), None, "A list of labels is expected, not a generator"),
        (["a", "b"], {"a": "x", "b": "y"}, None, "A list of labels is expected, not a dict"),
        (["a"] * 9, [[]] * 9, None, "All training samples have no label"),
        (["a", " "], ["x", "y"], None, "Item 1 is no text"),
        (["a", "b"], ["x", None], None, "Text 1 has no label"),
        (["a", "b"], [["x"], {"y"}], None, "The label of text 1 is {'y'}; .* a list of texts"),
        (["a", "b"], [("x",), ("y",)], None, "The label of text 0 is .* a list of texts"),
        (
            ["a", "b"],
            np.eye(2),
            None,
            "A list of labels is expected, not a ndarray of 2 axes: give one column of a table",
        ),
        (np.array([["a", "b"]] * 9), ["x"] * 9, None, "A list of texts is expected, not a ndarray of 2 axes"),
        (["a"] * 9, ["x"] * 9, None, "All training samples have the label 'x'"),
        (["a"] * 9, [1.5] * 9, None, "All training numbers are the same"),
        (["a"] * 9, ["x", ["x", "y"]] * 4 + ["y"], "text-classification", "one label a text"),
        (["a"] * 9, [1.5, "nine"] * 4 + [2], "regression", "'nine' is no finite number"),
        (["a"] * 9, [1.5, float("nan")] * 4 + [2], None, "Text 1 has no label"),
        (["a"] * 9, ["1.5", "nan", "2"] * 3, None, "'nan' is no finite number"),
        ([["a"], ["b"]], [["O"], ["ANI"]], None, "The tag 'ANI' is not understood: O, B-TYPE and I-TYPE"),
        (["a"] * 30, [str(index) for index in range(30)], None, "30 different labels"),
        (["a"] * 4, ["x", "y"] * 2, None, "too few to split"),
        (["a"] * 9, list("abcdefghi"), None, "too few samples of most labels"),
        (["a"] * 9, ["x", "y", "x"] * 3, "token-classification", "needs tokens and tags"),
        ([["a"], ["b"]], [["O"], ["O", "O"]], None, "as many tags"),
        ([["a"], [3]], [["O"], ["O"]], None, "Item 1: tokens are texts"),
        (["a"] * 9, ["x", {}, "y"] * 3, None, "a text or a number"),
    ],
)
def test_labels_that_cannot_be(texts: Any, labels: Any, kind: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):  # noqa: PT012
        samples = labelled_samples(texts, labels)
        found = find_labels(samples, kind)
        split(normalized(samples, found.kind), found, 0)


def test_texts_that_judge_are_not_learned_from(sentence_model: Path, tmp_path: Path) -> None:
    texts, labels = animals(20)
    texts = [f"{text}, and that is the end of story number {index}" for index, text in enumerate(texts)]
    samples, more = labelled_samples(texts, labels), dict[str, Any](frozen_encoder=True, training=TrainingOptions())
    facts = fit_samples(sentence_model, samples[4:], samples[:8], folder=tmp_path / "some", **more)
    assert (facts["training_samples"], facts["evaluation_samples"]) == (12, 8)
    assert "4 training texts are evaluation texts too, and long enough to be left out of the training" in facts["notes"]
    with pytest.raises(InputError, match="All training texts are evaluation texts too"):
        fit_samples(sentence_model, samples, samples, folder=tmp_path / "all", **more)
    first = [sample for sample in samples if sample.label == samples[0].label]
    with pytest.raises(InputError, match="All training samples have the label"):
        fit_samples(sentence_model, samples, first, folder=tmp_path / "one", **more)
    with pytest.raises(InputError, match="Too few different texts"):
        fit_samples(sentence_model, (samples[0], samples[1]) * 20, None, folder=tmp_path / "two", **more)
    with pytest.raises(InputError, match="All samples that judge have the label"):
        fit_samples(sentence_model, samples[8:], first[:3], folder=tmp_path / "alike", **more)
    assert [path.name for path in tmp_path.iterdir()] == ["some"]
    short = labelled_samples([f"cat {index}" for index in range(20)], labels)
    facts = fit_samples(sentence_model, short[:10], short[5:], folder=tmp_path / "short", **more)
    assert (
        "5 of 15 evaluation texts, of less than 30 characters, were learned from too: they prove little"
        in facts["notes"]
    )


def test_arrays_are_taken_for_lists(sentence_model: Path) -> None:
    texts, labels = animals(20)
    assert labelled_samples(np.array(texts), np.array(labels)) == labelled_samples(texts, labels)
    with pytest.raises(InputError, match="evaluation is a pair: a list of texts, and a list of their labels"):
        Engine.load(sentence_model).fit(texts, labels, frozen_encoder=True, evaluation=texts)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_length is a positive whole number, not '8'"):
        Engine.load(sentence_model).fit(texts, labels, frozen_encoder=True, max_length="8")  # type: ignore[arg-type]
    engine = Engine.load(sentence_model).fit(texts, labels, frozen_encoder=True)
    for collection in (set(texts), frozenset(texts), dict(zip(texts, labels, strict=True))):
        with pytest.raises(InputError, match=f"A {type(collection).__name__} was given where a list of texts"):
            engine.predict(collection)  # type: ignore[arg-type]


def test_a_label_that_all_texts_have_teaches_a_frozen_head_nothing(sentence_model: Path) -> None:
    texts, labels = animals(40)
    with pytest.raises(InputError, match="The label 'alive' is in all training texts or in none"):
        Engine.load(sentence_model).fit(texts, [[label, "alive"] for label in labels], frozen_encoder=True)


def test_whole_numbers_are_classes_and_that_is_said() -> None:
    labels = find_labels(labelled_samples(["a"] * 9, ["1.0", "2", 3.0] * 3), None)
    assert labels.names == ("1", "2", "3")
    assert told(labels) == "the labels are 3 whole numbers, taken as classes; --task regression predicts numbers"
    assert told(find_labels(labelled_samples(["a"] * 4, ["0", "1"] * 2), None)) is None


def test_files_and_options_that_cannot_be(model: Path, tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", *animals(20))
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "bare.csv").write_text("text\na cat\n")
    (tmp_path / "bad.txt").write_text("1 a fine film\n0\n")
    (tmp_path / "bad.conll").write_text("cat X-ANIMAL\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    other = write(tmp_path / "other.jsonl", ["a cat"], ["reptile"])
    numbers = write(tmp_path / "numbers.jsonl", ["a cat", "a dog"], [0, 1])

    def refused(message: str, *, file: Path = good, kind: Any = InputError, **more: Any) -> None:
        with pytest.raises(kind, match=message):
            fit(model, file, **{"out": tmp_path / "out", **more})

    refused("does not exist", file=tmp_path / "none.csv")
    refused("holds no samples", file=tmp_path / "empty.csv", kind=onnxpress.OnnxpressError)
    refused("has no labels", file=tmp_path / "bare.csv")
    refused("line 2 has a label and no text", file=tmp_path / "bad.txt", kind=RecipeError)
    refused("line 1: a token and, last, its tag", file=tmp_path / "bad.conll", kind=RecipeError)
    refused("no task 'translation'", task="translation")
    refused("'reptile' is in none", evaluation=other)
    refused("'0' is in none of the training samples; their labels are: canine, feline", evaluation=numbers)
    refused("Unknown option 'epoch'", kind=onnxpress.OnnxpressError, epoch=3)
    refused("precision 'int3'", kind=onnxpress.OnnxpressError, precision="int3")
    refused("epochs would change nothing", frozen_encoder=True, epochs=3)
    refused("balanced goes with", balanced=True, task="multi-label-classification")
    refused("no artifact", kind=OutputError, out=tmp_path / "full")
    refused("there already", kind=OutputError, checkpoint=tmp_path / "full")
    refused("cannot be the working directory", checkpoint=".")
    refused("takes 1 to 40 tokens", kind=SourceError, max_length=99)
    assert not list(tmp_path.glob("out*"))
    assert not list(tmp_path.glob(".*"))


def test_numbers_and_texts_that_are_one_label(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text,label\na,1\nb,0\nc,10\nd,2\n")
    from_csv = find_labels(read_labelled(tmp_path / "one.csv", None), None)
    from_python = find_labels(labelled_samples(list("abcd"), [1, 0.0, "10", np.int64(2)]), None)
    assert from_csv.names == from_python.names == ("0", "1", "2", "10")


def test_the_split_is_stratified_and_seeded() -> None:
    samples = labelled_samples([f"text {index}" for index in range(100)], ["a"] * 80 + ["b"] * 19 + ["c"])
    labels = find_labels(samples, None)
    train, held = split(samples, labels, 3)
    assert (len(train), len(held)) == (90, 10)
    assert sorted(sample.label for sample in held) == ["a"] * 8 + ["b"] * 2
    assert split(samples, labels, 3) == (train, held)
    assert split(samples, labels, 4) != (train, held)
    assert not {sample.text for sample in train} & {sample.text for sample in held}


@pytest.mark.parametrize("seed", range(8))
def test_held_out_sets_of_labels_are_not_all_alike(seed: int) -> None:
    texts = [f"text {number}" for number in range(60)]
    samples = labelled_samples(texts, [["a", "b"] if number % 5 == 0 else ["b"] for number in range(60)])
    train, held = split(samples, find_labels(samples, "multi-label-classification"), seed)
    assert len(train) + len(held) == 60
    assert {len(sample.label) for sample in held} == {1, 2}
    assert any(len(sample.label) == 2 for sample in train)


def test_the_split_holds_some_of_each_label_that_can_be_judged() -> None:
    """Also of one so rare that a tenth has none of it in proportion; and what is there once is learned from."""
    samples = labelled_samples([f"text {index}" for index in range(87)], ["a"] * 80 + ["b"] * 4 + ["c"] * 2 + ["d"])
    train, held = split(samples, find_labels(samples, None), 0)
    assert {sample.label for sample in train} == {"a", "b", "c", "d"}
    assert {sample.label for sample in held} == {"a", "b", "c"}
    assert len(train) + len(held) == len(samples)
    assert not {sample.text for sample in train} & {sample.text for sample in held}
    for seed in range(9):  # one is held out by some of them
        several = labelled_samples(
            [f"text {index}" for index in range(20)], [["a"], ["a", "b"]] * 9 + [["a", "c"], ["a"]]
        )
        train, held = split(several, find_labels(several, None), seed)
        assert {name for sample in train for name in sample.label} == {"a", "b", "c"}
        assert (
            1 < len({str(sample.label) for sample in held}) <= len(held) <= 3
        )  # a tenth, and one where these were alike


@pytest.mark.parametrize(("step", "found"), [(1, "training"), (2, "trained")])
def test_an_interrupt_while_the_trained_model_takes_its_place_leaves_one_or_the_other(
    step: int, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    (folder / "training").mkdir(parents=True)
    interrupt_rename(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        _write_whole(folder, lambda part: (part / "trained").touch())
    assert [path.name for path in folder.iterdir()] == [found]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_training_that_a_kill_put_aside_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_aside = tmp_path / ".checkpoint.part-999999999-old" / "training"
    put_aside.mkdir(parents=True)
    (put_aside / "training.json").write_text("{}")
    (tmp_path / ".checkpoint.part-999999999").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _check_checkpoint_folder(Path("checkpoint"), resume=True) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    with pytest.raises(OutputError, match="go on with --resume"):
        _check_checkpoint_folder(Path("checkpoint"), resume=False)
    _write_whole(Path("checkpoint"), lambda part: (part / "trained").touch())
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoint", "trained"]


def test_a_training_that_was_killed_before_it_began_has_to_be_begun(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "training.json.part").touch()
    assert _check_checkpoint_folder(tmp_path, resume=False) is None
    with pytest.raises(InputError, match="begin without --resume"):
        _check_checkpoint_folder(tmp_path, resume=True)
    (tmp_path / "training" / "train.csv").write_text("what somebody keeps in a folder of this name")
    with pytest.raises(OutputError, match="is there already"):
        _check_checkpoint_folder(tmp_path, resume=False)
