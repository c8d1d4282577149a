"""Texts to train on become examples: pairs, windows, masks, labels; what cannot be is one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_decoders import save_byte_tokenizer
from tiny_models import save_tokenizer

from onnxpress.errors import UsageError
from onnxpress.runtime.tokenization import Tokenizer
from onnxpress.training_texts import WINDOW, training_examples

LABELS: dict[str, Any] = {"labels": ["no", "yes"], "problem_type": "single_label_classification"}


@pytest.fixture
def words(tmp_path: Path) -> Tokenizer:
    save_tokenizer(tmp_path)
    return Tokenizer.from_folder(tmp_path, max_length=16)


@pytest.fixture
def letters(tmp_path: Path) -> Tokenizer:
    save_byte_tokenizer(tmp_path)
    return Tokenizer.from_folder(tmp_path, max_length=1024)


def test_lines_are_texts_and_long_ones_are_cut_and_told(words: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("the cat sat\n\nthe dog ran\r\n" + "red " * 20 + "\n")
    examples, notes = training_examples("feature-extraction", words, {}, file=file)
    assert [len(example["input_ids"]) for example in examples] == [3, 3, 16]
    assert notes == ("1 of 3 training texts are cut at 16 tokens",)


def test_pieces_of_texts_are_neighbouring_words_and_the_same_each_time(words: Tokenizer, tmp_path: Path) -> None:
    file, pairs = tmp_path / "texts.txt", tmp_path / "pairs.csv"
    file.write_text("the cat sat on red\n")
    pairs.write_text("text,text_pair\nthe dog,the cat\n")

    def ids(file: Path, **options: int) -> list[list[int]]:
        return [
            one["input_ids"] for one in training_examples("text-classification", words, LABELS, file=file, **options)[0]
        ]

    (whole,) = ids(file)
    found = ids(file, pieces=20)
    assert found[0] == whole
    assert {tuple(part) for part in found[1:]} < {tuple(whole[i:j]) for j in range(1, 6) for i in range(j)}
    assert len(found) == len({tuple(part) for part in found}) > 5
    assert ids(file, pieces=20) == found != ids(file, pieces=20, seed=1)
    assert ids(pairs, pieces=20) == ids(pairs)  # stay whole


def test_pieces_of_texts_without_spaces_are_characters(letters: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("这部电影很好看\n", encoding="utf-8")
    examples, _ = training_examples("feature-extraction", letters, {}, file=file, pieces=9)
    texts = [letters.inner.decode(example["input_ids"]) for example in examples]
    assert all(text in "这部电影很好看" for text in texts)
    assert len(texts) > 4


def test_labels_are_names_or_numbers_and_only_where_asked_for(words: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "texts.csv"
    file.write_text("text,label\nthe cat,yes\nthe dog,0\n")
    assert "labels" not in training_examples("text-classification", words, LABELS, file=file)[0][0]
    examples, _ = training_examples("text-classification", words, LABELS, file=file, labels=True)
    assert [example["labels"] for example in examples] == [1, 0]
    numbers, _ = training_examples(
        "text-classification",
        words,
        {"labels": ["score"], "problem_type": "regression"},
        file=number_file(tmp_path),
        labels=True,
    )
    assert [example["labels"] for example in numbers] == [0.5, -2.0]


def number_file(folder: Path) -> Path:
    file = folder / "numbers.csv"
    file.write_text("text,label\nthe cat,0.5\nthe dog,-2\n")
    return file


def test_pairs_stay_together_but_for_embeddings(words: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("sentence1\tsentence2\nthe cat\tthe dog ran\nthe cat\ta mat\n")
    embedded, _ = training_examples("feature-extraction", words, {}, file=file)
    assert [len(example["input_ids"]) for example in embedded] == [2, 3, 2]  # each text once
    paired, _ = training_examples("text-classification", words, LABELS, file=file)
    assert [len(example["input_ids"]) for example in paired] == [5, 4]


def test_language_models_read_windows_of_everything_with_ends_between(letters: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join('{"text": "' + letter * 300 + '"}' for letter in "xyz"))
    examples, _ = training_examples("text-generation", letters, {"eos_token_ids": [0]}, file=file)
    assert [len(example["input_ids"]) for example in examples] == [WINDOW, WINDOW, WINDOW, 903 - 3 * WINDOW]
    joined = [token for example in examples for token in example["input_ids"]]
    assert [place for place, token in enumerate(joined) if token == 0] == [300, 601, 902]
    assert all(example["labels"] == example["input_ids"] for example in examples)


def test_masks_are_put_by_the_seed_where_there_are_none(words: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("the cat sat on a mat the dog ran to the red house\nthe [MASK] sat\n")
    options = {"mask_token": "[MASK]"}
    first, again, other = (
        [example["input_ids"] for example in training_examples("fill-mask", words, options, file=file, seed=seed)[0]]
        for seed in (0, 0, 1)
    )
    mask = words.inner.token_to_id("[MASK]")
    assert first == again
    assert first[0] != other[0]
    assert first[0].count(mask) == 2  # 15 % of 13
    assert first[1] == other[1] == words.encode(["the [MASK] sat"])[0].ids


def test_the_built_in_texts_serve_where_no_file_is_given_and_say_so(letters: Tokenizer) -> None:
    examples, notes = training_examples("question-answering", letters, {})
    assert len(examples) == 26
    assert "built-in texts alone" in notes[-1]


@pytest.mark.parametrize(
    ("name", "content", "task", "more", "message"),
    [
        ("empty.txt", " \n", "feature-extraction", {}, "holds no samples"),
        ("missing.txt", None, "feature-extraction", {}, "cannot be read"),
        ("lines.txt", "the cat", "question-answering", {}, "context"),
        ("short.txt", "x", "text-generation", {}, "no text has two tokens"),
        ("lines.txt", "the cat", "text-classification", {"labels": True}, "labels were asked for"),
        (
            "bad.csv",
            "text,label\nthe cat,maybe\n",
            "text-classification",
            {"labels": True},
            "does not know the labels 'maybe'",
        ),
    ],
)
def test_bad_files_are_one_clear_error(
    letters: Tokenizer, tmp_path: Path, name: str, content: str | None, task: str, more: dict[str, Any], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        training_examples(task, letters, LABELS, file=tmp_path / name, **more)
