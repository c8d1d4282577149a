"""The answers of classifiers, entities and masks are those of transformers' own pipelines, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers as tf
from tiny_artifacts import DIM, VOCABULARY, save_embedder, save_per_text, save_per_token, save_tokenizer
from tokenizers import models, pre_tokenizers

from onnxpress.errors import InputError
from onnxpress.manifest import Arrays
from onnxpress.runtime import Embedder, FillMask, Session, TextClassifier, TokenClassifier, TruncationWarning
from onnxpress.runtime.tokenization import Tokenizer

MAX_LENGTH = 32
TEXTS = ["The cats sat on a red mat.", "playing dogs ran to the house", "a red cat, the dogs ?", "mats"]
ENTITIES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
CONFIG = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 40,
}


class PyTorch:
    """A transformers model as a runnable."""

    input_names = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, auto_class: Any, **more: Any) -> None:
        torch.manual_seed(11)
        self.model = auto_class.from_config(tf.BertConfig(**CONFIG, initializer_range=0.6, **more)).eval()

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        with torch.inference_mode():
            outputs = self.model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path), max_length=MAX_LENGTH)


@pytest.fixture
def fast(tmp_path: Path) -> Callable[[], Any]:
    """The same tokenizer as transformers has it."""

    def make() -> Any:
        tokenizer = tf.PreTrainedTokenizerFast(
            tokenizer_file=str(save_tokenizer(tmp_path) / "tokenizer.json"),
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            mask_token="[MASK]",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        )
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        return tokenizer

    return make


PROBLEMS = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_text_classification(tokenizer: Tokenizer, fast: Callable[[], Any], problem: str) -> None:
    labels = ["good", "bad", "odd"] if problem != "regression" else ["similarity"]
    runnable = PyTorch(
        tf.AutoModelForSequenceClassification,
        id2label=dict(enumerate(labels)),
        label2id={n: i for i, n in enumerate(labels)},
    )
    pipeline = tf.pipeline("text-classification", model=runnable.model, tokenizer=fast(), device="cpu")
    expected = pipeline(TEXTS, top_k=None, function_to_apply=PROBLEMS[problem])
    found = TextClassifier(runnable, tokenizer, {"labels": labels, "problem_type": problem}).predict(TEXTS)
    assert len(found) == len(TEXTS)
    for row, answer in zip(expected, found, strict=True):
        assert answer["label"] == row[0]["label"]
        assert answer["score"] == pytest.approx(row[0]["score"], abs=2e-6)
        assert answer["scores"] == pytest.approx({entry["label"]: entry["score"] for entry in row}, abs=2e-6)
        assert answer["truncated"] is False


def test_a_rerankers_one_number_goes_through_a_sigmoid(tokenizer: Tokenizer, fast: Callable[[], Any]) -> None:
    runnable = PyTorch(tf.AutoModelForSequenceClassification, num_labels=1)
    pipeline = tf.pipeline("text-classification", model=runnable.model, tokenizer=fast(), device="cpu")
    options = {"labels": ["LABEL_0"], "problem_type": "regression", "activation": "sigmoid"}
    found = TextClassifier(runnable, tokenizer, options).predict(TEXTS)
    assert [answer["score"] for answer in found] == pytest.approx([row["score"] for row in pipeline(TEXTS)], abs=2e-6)


def test_pairs_are_classified(tokenizer: Tokenizer, fast: Callable[[], Any]) -> None:
    runnable = PyTorch(tf.AutoModelForSequenceClassification, num_labels=2)
    pipeline = tf.pipeline("text-classification", model=runnable.model, tokenizer=fast(), device="cpu")
    expected = pipeline({"text": "the cats sat", "text_pair": "a dog ran ."}, top_k=None)
    options = {"labels": ["LABEL_0", "LABEL_1"], "problem_type": "single_label_classification"}
    found = TextClassifier(runnable, tokenizer, options).predict([("the cats sat", "a dog ran .")])
    assert found[0]["scores"] == pytest.approx({row["label"]: row["score"] for row in expected}, abs=2e-6)


def test_truncated_texts_are_marked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    session = Session(save_per_text(tmp_path / "model.onnx", 2))
    runner = TextClassifier(session, tokenizer, {"labels": ["a", "b"], "problem_type": "single_label_classification"})
    with pytest.warns(TruncationWarning, match="1 of 2 texts") as caught:
        found = runner.predict(["the cat", "the cat " * 50])
    assert caught[0].filename == __file__
    assert [answer["truncated"] for answer in found] == [False, True]


@pytest.mark.parametrize("aggregation", ["first", "average", "max"])
@pytest.mark.parametrize("labels", [ENTITIES, ["O", "PER", "LOC"]], ids=["bio", "plain"])
def test_token_classification(
    tokenizer: Tokenizer, fast: Callable[[], Any], aggregation: Any, labels: list[str]
) -> None:
    runnable = PyTorch(
        tf.AutoModelForTokenClassification,
        id2label=dict(enumerate(labels)),
        label2id={n: i for i, n in enumerate(labels)},
    )
    with torch.inference_mode():  # so that every label occurs
        logits = runnable.model(torch.arange(len(VOCABULARY))[None]).logits[0]
        runnable.model.classifier.bias -= logits.mean(0)
    pipeline = tf.pipeline(
        "token-classification",
        model=runnable.model,
        tokenizer=fast(),
        aggregation_strategy=aggregation,
        device="cpu",
    )
    found = TokenClassifier(runnable, tokenizer, {"labels": labels}).predict(TEXTS, aggregation=aggregation)
    assert sum(map(len, found)) > 4
    for text, spans in zip(TEXTS, found, strict=True):
        expected = pipeline(text)
        assert [(span["entity"], span["start"], span["end"]) for span in spans] == [
            (row["entity_group"], row["start"], row["end"]) for row in expected
        ]
        np.testing.assert_allclose([s["score"] for s in spans], [r["score"] for r in expected], rtol=0, atol=2e-6)
        assert all(span["text"] == text[span["start"] : span["end"]] for span in spans)


class Scripted:
    """Says the given label of each token, with probability near one."""

    input_names = ("input_ids", "attention_mask")

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        logits = np.zeros((*feeds["input_ids"].shape, len(ENTITIES)), np.float32)
        for place, label in enumerate(self.labels):
            logits[:, place, label] = 20
        return {"logits": logits}


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-PER I-PER O", [("PER", "cat sat")]),
        ("B-PER B-PER O O", [("PER", "The"), ("PER", "cat")]),
        ("I-PER I-PER I-LOC O", [("PER", "The cat"), ("LOC", "sat")]),
        ("B-PER O I-PER O", [("PER", "The"), ("PER", "sat")]),
        ("O O O O", []),
    ],
)
def test_words_become_spans(tokenizer: Tokenizer, tags: str, spans: list[tuple[str, str]]) -> None:
    runnable = Scripted([0, *map(ENTITIES.index, tags.split()), 0])
    found = TokenClassifier(runnable, tokenizer, {"labels": ENTITIES}).predict(["The cat sat on"])[0]
    assert [(span["entity"], span["text"]) for span in found] == spans


def test_token_classification_refuses(tokenizer: Tokenizer) -> None:
    runner = TokenClassifier(Scripted([]), tokenizer, {"labels": ENTITIES})
    with pytest.raises(InputError, match="it can be first, average, max"):
        runner.predict(["the cat"], aggregation="simple")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pairs were given"):
        runner.predict([("the cat", "a dog")])  # type: ignore[list-item]
    with pytest.raises(InputError, match="A NoneType was given where a list"):
        runner.predict(None)  # type: ignore[arg-type]


def test_fill_mask(tokenizer: Tokenizer, fast: Callable[[], Any]) -> None:
    runnable = PyTorch(tf.AutoModelForMaskedLM)
    pipeline = tf.pipeline("fill-mask", model=runnable.model, tokenizer=fast(), device="cpu")
    texts = ["The [MASK] sat on a mat.", "[MASK] dog [MASK] to the House"]
    found = FillMask(runnable, tokenizer, {"mask_token": "[MASK]"}).predict(texts, top_k=3)
    assert [len(masks) for masks in found] == [1, 2]
    expected = [[pipeline(texts[0], top_k=3)], pipeline(texts[1], top_k=3)]
    for masks, rows in zip(found, expected, strict=True):
        for candidates, wanted in zip(masks, rows, strict=True):
            assert [c["token_id"] for c in candidates] == [row["token"] for row in wanted]
            np.testing.assert_allclose(
                [c["score"] for c in candidates], [r["score"] for r in wanted], rtol=0, atol=2e-6
            )
    second = found[1][1][0]
    assert second["sequence"] == f"[MASK] dog {second['token']} to the House"


def test_fill_mask_refuses_a_text_without_a_mask(tokenizer: Tokenizer, tmp_path: Path) -> None:
    session = Session(save_per_token(tmp_path / "model.onnx", {"logits": len(VOCABULARY)}))
    runner = FillMask(session, tokenizer, {"mask_token": "[MASK]"})
    with pytest.raises(InputError, match=r"Text 1 has no mask: write \[MASK\]"):
        runner.predict(["the [MASK]", "the cat"])
    with pytest.raises(InputError, match="top_k=0"):
        runner.predict(["the [MASK]"], top_k=0)
    with pytest.raises(InputError, match="where the text was cut"), pytest.warns(TruncationWarning):
        runner.predict(["the cat " * 50 + "[MASK]"])


def test_embeddings_of_a_model_without_pooling_are_means(tokenizer: Tokenizer, tmp_path: Path) -> None:
    session = Session(save_per_token(tmp_path / "model.onnx", {"last_hidden_state": DIM}))
    runner = Embedder(session, tokenizer, {"dim": DIM, "pooled": False, "normalized": False})
    hidden = [answer["last_hidden_state"] for answer in runner.outputs(TEXTS)]
    assert [rows.shape for rows in hidden] == [(len(encoding), DIM) for encoding in tokenizer.encode(TEXTS)]
    found = runner.embed(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack([rows.mean(0) for rows in hidden]), rtol=0, atol=1e-6)


def test_no_texts_give_no_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    session = Session(save_embedder(tmp_path / "model.onnx"))
    assert Embedder(session, tokenizer, {"dim": DIM, "pooled": True}).embed([]).shape == (0, DIM)
    assert TextClassifier(session, tokenizer, {}).predict([]) == []
    assert TokenClassifier(session, tokenizer, {}).predict([]) == []
    assert FillMask(session, tokenizer, {"mask_token": "[MASK]"}).predict([]) == []


@pytest.mark.parametrize("count", [1, 5])
def test_what_the_command_line_prints_is_json(tokenizer: Tokenizer, tmp_path: Path, count: int) -> None:
    import json

    session = Session(save_per_token(tmp_path / "tokens.onnx", {"logits": len(ENTITIES)}))
    vectors = Session(save_embedder(tmp_path / "vectors.onnx"))
    labels = Session(save_per_text(tmp_path / "labels.onnx", 2))
    options = {"labels": ["a", "b"], "problem_type": "single_label_classification"}
    for runner in (
        TokenClassifier(session, tokenizer, {"labels": ENTITIES}),
        Embedder(vectors, tokenizer, {"dim": DIM, "pooled": True}),
        TextClassifier(labels, tokenizer, options),
    ):
        assert len(json.loads(json.dumps(runner.answer_texts(TEXTS[:1] * count)))) == count
        with pytest.raises(InputError, match="leave top_k out"):
            runner.answer_texts(TEXTS, top_k=2)


def test_probabilities_do_not_overflow(tokenizer: Tokenizer) -> None:
    class Extreme:
        input_names = ("input_ids", "attention_mask")

        def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
            return {"logits": np.array([[-1e4, 0, 1e4]] * len(feeds["input_ids"]), np.float32)}

    for problem, scores in (
        ("multi_label_classification", [0.0, 0.5, 1.0]),
        ("single_label_classification", [0.0, 0.0, 1.0]),
    ):
        runner = TextClassifier(Extreme(), tokenizer, {"labels": ["a", "b", "c"], "problem_type": problem})
        assert list(runner.predict(["the cat"])[0]["scores"].values()) == scores


def test_one_text_in_place_of_a_list_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    session = Session(save_embedder(tmp_path / "model.onnx"))
    calls = (
        Embedder(session, tokenizer, {"dim": DIM, "pooled": True}).embed,
        TextClassifier(session, tokenizer, {}).predict,
        TokenClassifier(session, tokenizer, {}).predict,
        FillMask(session, tokenizer, {"mask_token": "[MASK]"}).predict,
    )
    for call in calls:
        for text in ("the cat", ""):
            with pytest.raises(InputError, match="One text was given"):
                call(text)  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["metaspace", "bytes"])
def test_entities_hold_no_white_space_that_a_tokenizer_adds_to_words(kind: str) -> None:
    """SentencePiece's and GPT-2's tokenizers count the space before a word to its first token."""
    splitter: Any = (
        pre_tokenizers.Metaspace() if kind == "metaspace" else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    pieces = [piece for piece, _ in splitter.pre_tokenize_str("The cat sat on")]
    inner = tokenizers.Tokenizer(models.WordLevel({piece: place for place, piece in enumerate(pieces)}, "?"))
    inner.pre_tokenizer = splitter
    tokenizer = Tokenizer(inner, max_length=8, pad_token_id=0)
    assert tokenizer.encode(["The cat sat on"])[0].offsets[1] == (3, 7)
    found = TokenClassifier(Scripted([0, 1, 2, 3]), tokenizer, {"labels": ENTITIES}).predict(["The cat sat on"])[0]
    assert [(span["text"], span["start"], span["end"]) for span in found] == [("cat sat", 4, 11), ("on", 12, 14)]


def test_fill_mask_names_only_what_has_a_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Models round their vocabulary up, so the last ids stand for nothing."""
    size = len(VOCABULARY)
    session = Session(save_per_token(tmp_path / "model.onnx", {"logits": size + 30}))
    runner = FillMask(session, tokenizer, {"mask_token": "[MASK]"})
    candidates = runner.predict(["the [MASK] sat"], top_k=size + 30)[0][0]
    assert sorted(candidate["token_id"] for candidate in candidates) == list(range(size))
    assert all(candidate["token"] for candidate in candidates)
    assert sum(candidate["score"] for candidate in candidates) < 1
