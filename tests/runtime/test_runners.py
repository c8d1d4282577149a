"""From a model folder through the export to the runner: answers as transformers' own, alone or among others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import add_pooling, load_text_model, save_model

from onnxpress.exporters import export
from onnxpress.graph_files import save
from onnxpress.runtime import CPU, Embedder, FillMask, QuestionAnswerer, Session, TextClassifier, TokenClassifier
from onnxpress.runtime.loading import RUNNERS
from onnxpress.runtime.text_runner import TextRunner
from onnxpress.runtime.tokenization import Tokenizer

TASKS = {
    "feature-extraction": tf.AutoModel,
    "text-classification": tf.AutoModelForSequenceClassification,
    "token-classification": tf.AutoModelForTokenClassification,
    "question-answering": tf.AutoModelForQuestionAnswering,
    "fill-mask": tf.AutoModelForMaskedLM,
}
TEXTS = [
    "the cat sat on a mat",
    "dog",
    "a red dog ran to the blue house [MASK] the cat sat",
    "the house",
    "a [MASK] sat",
]
QUESTION = "the red cat"
Case = tuple[TextRunner, Path]


def exported(folder: Path, task: str) -> Case:
    save_model(folder / "model", "bert", TASKS[task])
    if task == "feature-extraction":
        pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
        add_pooling(folder / "model", ("Pooling", pooling), ("Normalize", None))
    result = export(folder / "model", task=task)
    save(result.graph, folder / "model.onnx")
    session = Session(folder / "model.onnx", signature=result.graph.signature, providers=[CPU(threads=2)])
    options = result.options
    tokenizer = Tokenizer.from_folder(
        folder / "model", max_length=options["max_length"], pad_token_id=options["pad_token_id"]
    )
    return RUNNERS[task](session, tokenizer, options, tokens_per_chunk=64), folder / "model"


@pytest.fixture(scope="module", params=TASKS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return exported(tmp_path_factory.mktemp("exported"), request.param)


def pipeline(task: str, folder: Path, **more: Any) -> Any:
    return tf.pipeline(task, model=load_text_model(folder, TASKS[task]), tokenizer=str(folder), device="cpu", **more)


def test_answers_as_transformers(case: Case) -> None:
    """Up to 1e-5, float32."""
    runner, folder = case
    if isinstance(runner, Embedder):
        model, tokenizer = load_text_model(folder), tf.AutoTokenizer.from_pretrained(folder)
        for text, vector in zip(TEXTS, runner.embed(TEXTS), strict=True):
            with torch.inference_mode():
                hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            expected = torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy()
            np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-5)
    elif isinstance(runner, TextClassifier):
        expected = pipeline(runner.task, folder)(TEXTS, top_k=None)
        for answer, rows in zip(runner.predict(TEXTS), expected, strict=True):
            assert answer["label"] == rows[0]["label"]
            assert answer["scores"] == pytest.approx({row["label"]: row["score"] for row in rows}, abs=1e-5)
    elif isinstance(runner, TokenClassifier):
        reference = pipeline(runner.task, folder, aggregation_strategy="average")
        for text, spans in zip(TEXTS, runner.predict(TEXTS, aggregation="average"), strict=True):
            words = [row for row in reference(text) if row["entity_group"] != "O"]
            assert [(s["entity"], s["start"], s["end"]) for s in spans] == [
                (row["entity_group"], row["start"], row["end"]) for row in words
            ]
            np.testing.assert_allclose([s["score"] for s in spans], [r["score"] for r in words], rtol=0, atol=1e-5)
    elif isinstance(runner, QuestionAnswerer):
        model, tokenizer = load_text_model(folder, TASKS[runner.task]), tf.AutoTokenizer.from_pretrained(folder)
        pairs = [(QUESTION, text) for text in TEXTS]
        for pair, answer in zip(pairs, runner.outputs(pairs), strict=True):
            with torch.inference_mode():
                outputs = model(**tokenizer(*pair, return_tensors="pt", return_token_type_ids=True))
            for name in ("start_logits", "end_logits"):
                np.testing.assert_allclose(answer[name], outputs[name][0].numpy(), rtol=0, atol=1e-5)
    elif isinstance(runner, FillMask):
        reference = pipeline(runner.task, folder)
        texts = [text for text in TEXTS if "[MASK]" in text]
        for text, (candidates,) in zip(texts, runner.predict(texts, top_k=4), strict=True):
            known = range(runner.tokenizer.inner.get_vocab_size())  # the model's vocabulary is larger
            rows = [row for row in reference(text, top_k=99) if row["token"] in known][:4]
            assert [row["token_id"] for row in candidates] == [row["token"] for row in rows]
            np.testing.assert_allclose([c["score"] for c in candidates], [r["score"] for r in rows], rtol=0, atol=1e-5)


def test_answers_do_not_depend_on_the_others_or_the_chunks(case: Case) -> None:
    """Each text alone, all together in any order, and in chunks of any size: equal up to 1e-5, in the order given."""
    runner, _ = case
    samples: list[Any] = [(QUESTION, text) for text in TEXTS] if runner.task == "question-answering" else TEXTS
    alone = [runner.outputs([sample])[0] for sample in samples]
    for tokens_per_chunk in (1, 16, 64, 10**6):
        other = type(runner)(runner.session, runner.tokenizer, runner.options, tokens_per_chunk=tokens_per_chunk)
        for order in (range(len(samples)), [3, 1, 4, 0, 2], [2, 2, 1]):
            answers = other.outputs([samples[place] for place in order])
            assert len(answers) == len(order)
            for place, answer in zip(order, answers, strict=True):
                assert answer.keys() == alone[place].keys()
                for name, array in answer.items():
                    assert array.shape == alone[place][name].shape
                    np.testing.assert_allclose(array, alone[place][name], rtol=0, atol=1e-5)


def test_nothing_gives_nothing(case: Case) -> None:
    runner, _ = case
    assert runner.outputs([]) == []
    assert runner.answer_texts([]) == []
