"""The built-in samples, and which of a file are taken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as InnerTokenizer
from tokenizers import models, pre_tokenizers

from onnxpress import metrics
from onnxpress.runtime.tokenization import Tokenizer
from onnxpress.samples import builtin_samples, spread

DATA = Path(metrics.__file__).with_name("data")


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def letters(languages: str) -> Tokenizer:
    """A tokenizer that knows the letters of some built-in languages and nothing else."""
    texts = [row.get("text") or row["question"] + row["context"] for name in ("sentences.jsonl", "questions.jsonl")
             for row in rows(name) if row["language"] in languages]  # fmt: skip
    vocabulary = {token: index for index, token in enumerate(["[UNK]", *sorted(set("".join(texts)))])}
    inner = InnerTokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return Tokenizer(inner, max_length=512, pad_token_id=0)


def test_built_in_texts_are_many_and_unique() -> None:
    sentences = rows("sentences.jsonl")
    texts = [row["text"] for row in sentences]
    assert len(set(texts)) == len(texts)
    assert sum(row["language"] == "en" for row in sentences) >= 400
    assert sum(row["language"] == "zh" for row in sentences) >= 200
    lengths = [len(row["text"].split()) for row in sentences if row["language"] == "en"]
    assert min(lengths) == 3
    assert 100 <= max(lengths) <= 130


def test_calibration_and_evaluation_share_no_sentence() -> None:
    parts: dict[str, set[str]] = {"calibration": set(), "evaluation": set()}
    for row in rows("sentences.jsonl"):
        words = re.findall(r"\w+", row["text"].lower())
        grams = zip(*(words[start:] for start in range(5)), strict=False)
        parts[row["split"]] |= {" ".join(gram) for gram in grams}
        parts[row["split"]] |= {part for part in re.split(r"(?<=[。？！])", row["text"]) if len(part) > 6}
    assert parts["calibration"]
    assert not parts["calibration"] & parts["evaluation"]


def test_questions_have_their_answers_in_the_context_and_contexts_one_split() -> None:
    questions = rows("questions.jsonl")
    assert len(questions) >= 60
    assert len({(row["question"], row["context"]) for row in questions}) == len(questions)
    assert all(row["answer"] in row["context"] for row in questions)
    splits = {(row["context"], row["split"]) for row in questions}
    assert len(splits) == len({context for context, _ in splits})


@pytest.mark.parametrize("task", ["feature-extraction", "question-answering", "fill-mask"])
def test_built_in_samples_are_disjoint_and_the_same_every_time(task: str) -> None:
    mask = "[MASK]" if task == "fill-mask" else None
    calibration, evaluation, notes = builtin_samples(task, letters("en zh"), mask_token=mask)
    assert (calibration, evaluation, notes) == builtin_samples(task, letters("en zh"), mask_token=mask)
    assert notes == ()
    assert calibration
    assert not set(map(str, calibration)) & set(map(str, evaluation))
    assert all((sample.text_pair is not None) == (task == "question-answering") for sample in calibration + evaluation)


def test_one_word_is_masked_and_in_chinese_one_character() -> None:
    originals = {row["text"]: row["language"] for row in rows("sentences.jsonl")}
    calibration, evaluation, _ = builtin_samples("fill-mask", letters("en zh"), mask_token="[MASK]")
    assert len(calibration) + len(evaluation) == len(originals)
    for sample in calibration + evaluation:
        before, found, after = sample.text.partition("[MASK]")
        assert found
        assert "[MASK]" not in after
        fits = [
            (text, language)
            for text, language in originals.items()
            if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)
        ]
        hidden = [text[len(before) : len(text) - len(after)] for text, _ in fits]
        assert any(
            len(word) == 1 if language == "zh" else re.fullmatch(r"\w+", word)
            for word, (_, language) in zip(hidden, fits, strict=True)
        )


def test_languages_that_the_tokenizer_does_not_know_are_left_out_with_a_note() -> None:
    calibration, evaluation, notes = builtin_samples("feature-extraction", letters("en"))
    assert len(notes) == 1
    assert re.match(r"built-in texts in zh left out: \d+% of their tokens are unknown", notes[0])
    chinese = {row["text"] for row in rows("sentences.jsonl") if row["language"] == "zh"}
    assert not chinese & {sample.text for sample in calibration + evaluation}


def test_samples_are_taken_from_all_over_a_file() -> None:
    assert spread(255, 128)[0] == 0
    assert spread(255, 128)[-1] == 254
    assert len(set(spread(255, 128))) == 128
    assert spread(3, 128) == [0, 1, 2]
    assert spread(5, 1) == [0]
    assert spread(6, 3) == [0, 2, 5]
