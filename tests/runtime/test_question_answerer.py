"""Answers of a tiny BERT, short contexts and windows, against the formulas of the field's pipeline on PyTorch.

transformers 5 has no question-answering pipeline any more; `reference` is the arithmetic of the one in transformers 4.57
(pipelines/question_answering.py: preprocess, select_starts_ends, decode_spans, get_indices), without its merging of equal
words from different places.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers as tf
from tiny_artifacts import VOCABULARY, WORDS, save_tokenizer

from onnxpress.errors import InputError
from onnxpress.manifest import Arrays
from onnxpress.runtime import QuestionAnswerer
from onnxpress.runtime.tokenization import Tokenizer

MAX_LENGTH = 32
STRIDE = MAX_LENGTH // 4
LONGEST = 15
QUESTION = "the cat sat on ?"
SHORT = "Playing cats ran to a red house."


class PyTorch:
    """A random BertForQuestionAnswering as a runnable that counts what it is given."""

    input_names = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self) -> None:
        torch.manual_seed(2)
        config = tf.BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=40,
            initializer_range=0.6,
        )
        self.model = tf.AutoModelForQuestionAnswering.from_config(config).eval()
        self.given: list[np.ndarray[Any, Any]] = []

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        self.given.extend(feeds["input_ids"])
        with torch.inference_mode():
            outputs = self.model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        return {name: tensor.numpy() for name, tensor in outputs.items()}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path), max_length=MAX_LENGTH)


def long_context(words: int = 90) -> str:
    random = np.random.default_rng(8)
    plain = [word for word in WORDS if word.isalpha()]
    return " ".join(f"{random.choice(plain)}{random.choice(['', 's', 'ing', '.', ','])}" for _ in range(words))


def reference(runnable: PyTorch, folder: Path, question: str, context: str, top_k: int) -> list[dict[str, Any]]:
    fast = tf.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    encoded = fast(
        question,
        context,
        truncation="only_second",
        max_length=MAX_LENGTH,
        stride=STRIDE,
        return_overflowing_tokens=True,
        return_token_type_ids=True,
        return_offsets_mapping=True,
        padding=False,
    )
    answers: dict[tuple[int, int], float] = {}
    for index, ids in enumerate(encoded["input_ids"]):
        feeds = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "token_type_ids": np.array([encoded["token_type_ids"][index]]),
        }
        outputs = runnable.run(feeds)
        allowed = np.array([sequence == 1 for sequence in encoded.sequence_ids(index)])
        allowed[0] = True  # [CLS] takes part in the softmax and is masked behind it
        start, end = (np.where(allowed, outputs[name][0], -10000.0) for name in ("start_logits", "end_logits"))
        start, end = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in (start, end))
        start[0] = end[0] = 0.0
        candidates = np.tril(np.triu(np.outer(start, end)), LONGEST - 1)
        within: dict[tuple[int, int], float] = {}
        for flat in np.argsort(-candidates, axis=None)[: 2 * top_k + 10]:
            first, last = np.unravel_index(flat, candidates.shape)
            if allowed[first] and allowed[last] and candidates[first, last] > 0:
                encoding = encoded[index]
                place = (
                    encoding.word_to_chars(encoding.token_to_word(first), 1)[0],
                    encoding.word_to_chars(encoding.token_to_word(last), 1)[1],
                )
                within[place] = within.get(place, 0.0) + float(candidates[first, last])
        for place, score in within.items():
            answers[place] = max(score, answers.get(place, 0.0))
    ranked = sorted(answers.items(), key=lambda item: -item[1])[:top_k]
    return [{"answer": context[s:e], "score": score, "start": s, "end": e} for (s, e), score in ranked]


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("context", [SHORT, long_context()], ids=["short", "windows"])
def test_as_the_field(tokenizer: Tokenizer, tmp_path: Path, context: str, top_k: int) -> None:
    runnable = PyTorch()
    expected = reference(runnable, tmp_path, QUESTION, context, top_k)
    runnable.given.clear()
    found = QuestionAnswerer(runnable, tokenizer, {}).predict([(QUESTION, context)], top_k=top_k)[0]
    assert len(runnable.given) == (
        1 if context == SHORT else len(tokenizer.windows((QUESTION, context), stride=STRIDE))
    )
    assert [(a["answer"], a["start"], a["end"]) for a in found] == [
        (a["answer"], a["start"], a["end"]) for a in expected
    ]
    np.testing.assert_allclose([a["score"] for a in found], [a["score"] for a in expected], rtol=0, atol=5e-6)
    assert all(answer["answer"] == context[answer["start"] : answer["end"]] for answer in found)


class Pointing:
    """Says that answers start at one word and end at one, wherever they stand, the question included."""

    input_names = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(self, first: str, last: str | None = None) -> None:
        self.first, self.last = VOCABULARY[first], VOCABULARY[last or first]

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        ids = feeds["input_ids"]
        starts, ends = (np.where(ids == token, 10.0, 0.0).astype(np.float32) for token in (self.first, self.last))
        return {"start_logits": starts, "end_logits": ends}


def test_an_answer_at_the_very_end_of_a_long_context_is_found(tokenizer: Tokenizer) -> None:
    context = "a cat sat on the mat . " * 40 + "Houses ran ."
    found = QuestionAnswerer(Pointing("house"), tokenizer, {}).answer("the red house ?", context)
    assert found["answer"] == "Houses"  # the whole word, of which "house" is the first token
    assert found["start"] == context.index("Houses")
    assert found["score"] > 0.9


def test_the_question_never_answers(tokenizer: Tokenizer) -> None:
    found = QuestionAnswerer(Pointing("house"), tokenizer, {}).answer("house house house ?", "the cat sat")
    assert found["answer"] in "the cat sat"
    assert found["end"] <= len("the cat sat")


def test_answers_never_end_before_they_start(tokenizer: Tokenizer) -> None:
    context = "the dog " + "sat on a mat " * 4 + "house"
    found = QuestionAnswerer(Pointing("house", "dog"), tokenizer, {}).predict([("the cat ?", context)], top_k=4)[0]
    assert len(found) == 4
    assert all(answer["start"] < answer["end"] for answer in found)


def test_the_surest_window_counts(tokenizer: Tokenizer) -> None:
    """The first dog is in two windows, and in the second of them there is another dog."""
    context = "cat " * 22 + "dog " + "cat " * 12 + "dog cat cat"
    assert len(tokenizer.windows(("the cat ?", context), stride=STRIDE)) == 2
    found = QuestionAnswerer(Pointing("dog"), tokenizer, {}).answer("the cat ?", context)
    assert found["start"] == context.index("dog")
    assert found["score"] > 0.9


def test_several_pairs_keep_their_order(tokenizer: Tokenizer) -> None:
    runner = QuestionAnswerer(Pointing("dog"), tokenizer, {})
    contexts = ["a dog ran", "the cat sat on a mat . " * 30 + "dog", "the red dog"]
    found = runner.predict([(QUESTION, context) for context in contexts])
    assert [answers[0]["start"] for answers in found] == [context.index("dog") for context in contexts]
    assert runner.predict([]) == []
    assert runner.answer_texts([(QUESTION, "a dog ran")], top_k=1)[0][0]["answer"] == "dog"


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(QUESTION, "a dog"), (QUESTION, "")], "Text 1 is empty"),
        ([("", "a dog")], "Text 0 is empty"),
        (["the cat"], "Item 0 is not a pair"),
        (None, "A NoneType was given where a list"),
        ([(QUESTION, "a dog"), (QUESTION, 3)], "Item 1 is a int"),
        ([("the cat " * 20, "a dog")], "first text has 40 tokens"),
    ],
)
def test_refuses(tokenizer: Tokenizer, pairs: Any, message: str) -> None:
    runner = QuestionAnswerer(Pointing("dog"), tokenizer, {})
    with pytest.raises(InputError, match=message):
        runner.predict(pairs)
    with pytest.raises(InputError, match="needs a context"):
        runner.answer_texts(["the cat"])
    with pytest.raises(InputError, match="top_k=0"):
        runner.predict([(QUESTION, "a dog")], top_k=0)


def test_answers_hold_no_white_space_that_a_tokenizer_adds_to_words() -> None:
    """SentencePiece's tokenizers count the space before a word to its first token."""
    words = {piece: place for place, piece in enumerate(("▁the", "▁cat", "▁house", "?"))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()

    class Last:
        input_names = ("input_ids", "attention_mask")

        def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
            logits = np.where(feeds["input_ids"] == words["▁house"], 10.0, 0.0)
            return {"start_logits": logits, "end_logits": logits}

    runner = QuestionAnswerer(Last(), Tokenizer(inner, max_length=16, pad_token_id=0), {})
    found = runner.answer("the cat", "the cat  house \n")
    assert (found["answer"], found["start"], found["end"]) == ("house", 9, 14)


def test_top_k_is_not_guessed(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="top_k=0"):
        QuestionAnswerer(Pointing("dog"), tokenizer, {}).answer_texts([(QUESTION, "a dog")], top_k=0)
