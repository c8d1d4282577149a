"""Texts become padded arrays as the transformers tokenizer makes them; what is cut is counted."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_artifacts import MAX_LENGTH, VOCABULARY, save_tokenizer
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from onnxpress.errors import ArtifactError, InputError
from onnxpress.runtime.tokenization import Tokenizer, split_words, trimmed

LONG = "the cats sat on a red mat . " * 10


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.from_folder(save_tokenizer(tmp_path), max_length=MAX_LENGTH)


@pytest.mark.parametrize(
    "sample", ["the cats sat", "The house.", LONG, ("the cat ?", "a dog ran"), ("the cat", LONG), (LONG, "the cat")]
)
def test_as_transformers(tokenizer: Tokenizer, tmp_path: Path, sample: str | tuple[str, str]) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="[PAD]")
    pair = sample if isinstance(sample, tuple) else (sample,)
    expected = reference(
        *pair, truncation=True, max_length=MAX_LENGTH, return_token_type_ids=True, return_offsets_mapping=True
    )
    found = tokenizer.encode([sample])[0]
    assert found.ids == expected["input_ids"]
    assert found.type_ids == expected["token_type_ids"]
    assert found.offsets == expected["offset_mapping"]
    assert found.words == expected.word_ids()
    assert found.sequences == expected.sequence_ids()
    whole = reference(*pair, padding=False, truncation=False)
    assert found.truncated == len(whole["input_ids"]) - len(found.ids)


def test_its_own_padding_and_truncation_are_ignored(tokenizer: Tokenizer) -> None:
    assert [len(encoding) for encoding in tokenizer.encode(["the cat", "the cat sat on a mat"])] == [4, 8]


def test_padding_to_a_multiple_stays_within_what_is_taken(tokenizer: Tokenizer) -> None:
    encodings = tokenizer.encode(["the cats sat on a mat"])
    count = len(encodings[0])
    assert count % 5
    up = -(-count // 5) * 5
    for most, length in ((None, up), (up, up), (up - 1, up - 1), (count, count)):
        assert tokenizer.batch(encodings, multiple=5, most=most)["input_ids"].shape == (1, length)


def test_pads_on_the_right(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(save_tokenizer(tmp_path), max_length=MAX_LENGTH, pad_token_id=1)
    arrays = tokenizer.batch(tokenizer.encode([("cat", "dog"), "cat"]))
    cat, dog, begin, end = (VOCABULARY[token] for token in ("cat", "dog", "[CLS]", "[SEP]"))
    np.testing.assert_array_equal(arrays["input_ids"], [[begin, cat, end, dog, end], [begin, cat, end, 1, 1]])
    np.testing.assert_array_equal(arrays["attention_mask"], [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(arrays["token_type_ids"], [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.int64)}


def test_a_hundred_thousand_characters(tokenizer: Tokenizer) -> None:
    text = LONG * 400
    assert len(text) > 100_000
    started = time.process_time()
    found = tokenizer.encode([text])[0]
    assert time.process_time() - started < 5  # processor time; a fraction of a second is usual
    assert len(found) == MAX_LENGTH
    assert found.truncated == 400 * 10 * 9 + 2 - MAX_LENGTH


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (["the cat", ""], "Text 1 is empty"),
        (["the cat", " \n\t"], "Text 1 is empty"),
        ([("the cat", "")], "Text 0 is empty"),
        (["the cat", 7], "Item 1 is a int"),
        (["the cat", None], "Item 1 is a NoneType"),
        ([("the cat", b"dog")], "Item 0 is a bytes"),
        ([("a", "b", "c")], "Item 0 is a tuple"),
        ("the cat", "One text was given"),
        (["the \ud800 cat"], "half a character"),
    ],
)
def test_refuses_what_is_no_text(tokenizer: Tokenizer, samples: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenizer.encode(samples)  # type: ignore[arg-type]


class Column:
    """One row of a table's column, which goes by its name and not by its place."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[str]:
        return iter(["the cat"])


@pytest.mark.parametrize("samples", [Column(), {7: "the cat"}.values()])
def test_one_text_that_has_no_place(tokenizer: Tokenizer, samples: Any) -> None:
    assert tokenizer.encode(samples)[0].ids == tokenizer.encode(["the cat"])[0].ids


def test_windows_cover_the_second_text_and_overlap(tokenizer: Tokenizer) -> None:
    question, context = "the dog ?", LONG
    windows = tokenizer.windows((question, context), stride=4)
    whole = tokenizer.inner.encode(context, add_special_tokens=False)
    first, covered = 5, []  # [CLS] the dog ? [SEP]
    for window in windows:
        assert len(window) <= MAX_LENGTH
        assert window.ids[:first] == windows[0].ids[:first]
        covered.append(window.offsets[first:-1])
    assert [offset for part in covered for offset in part[4 if part is not covered[0] else 0 :]] == whole.offsets
    for before, after in itertools.pairwise(covered):
        assert before[-4:] == after[:4]


def test_a_question_that_leaves_no_room_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"first text has 90 tokens, .* 8 tokens are allowed"):
        tokenizer.windows((LONG, "the cat"), stride=4)


def test_threads_do_not_see_each_others_truncation(tokenizer: Tokenizer) -> None:
    def work(index: int) -> tuple[int, int]:
        if index % 2:
            return len(tokenizer.encode([LONG])[0]), len(tokenizer.windows(("the dog ?", LONG), stride=4))
        return len(tokenizer.encode(["the cat"])[0]), len(tokenizer.windows(("the dog ?", LONG), stride=2))

    alone = [work(0), work(1)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(64))) == alone * 32


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": 3}', "\x00\x01"])
def test_names_a_missing_or_corrupt_file(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path, max_length=4)


def test_a_text_without_tokens_is_named(tmp_path: Path) -> None:
    """A vocabulary without an unknown token drops what it does not know; a row of padding alone would be answered."""
    inner = HuggingFaceTokenizer(models.BPE({"a": 0, "b": 1}, []))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(inner, max_length=4, pad_token_id=0)
    with pytest.raises(InputError, match="Text 1 has no tokens"):
        tokenizer.encode(["ab", "ß"])
    assert [len(encoding) for encoding in tokenizer.encode(["ab", "aß"])] == [2, 1]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 3, "the"), (3, 9, "cat"), (0, 11, "the  \ncat"), (3, 6, ""), (4, 4, "")],
)
def test_trimmed(start: int, end: int, expected: str) -> None:
    text = "the  \ncat\t "
    start, end = trimmed(text, start, end)
    assert text[start:end] == expected


def test_white_space_ends_a_word_where_the_tokenizer_takes_a_text_for_one() -> None:
    """Llama's form: no splitting before, blanks are part of tokens."""
    vocabulary = {"<unk>": 0, "▁": 1, "▁the": 2, "▁cat": 3, "s": 4, "t": 5, "h": 6, "e": 7, "c": 8, "a": 9}
    vocabulary |= {"th": 10, "the": 11, "ca": 12, "cat": 13}
    merges = [("t", "h"), ("th", "e"), ("c", "a"), ("ca", "t"), ("▁", "the"), ("▁", "cat")]
    inner = HuggingFaceTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = Tokenizer(inner, max_length=20, pad_token_id=0)
    (encoding,) = tokenizer.encode(["the cats the"])
    assert encoding.words == [0, 0, 0, 0]
    assert split_words(encoding, ["the cats the"]) == [0, 1, 1, 2]
    (pair,) = tokenizer.encode([("the cats", "cats the")])
    assert split_words(pair, ("the cats", "cats the")) == [0, 1, 1, 2, 2, 3]


def test_a_lone_sign_for_a_space_is_part_of_the_word_behind_it() -> None:
    """Camembert's form: the sign has the place of the first letter."""
    vocabulary = [("<unk>", 0.0), ("▁", -2.0), ("▁the", -2.0), ("York", -2.0)]
    inner = HuggingFaceTokenizer(models.Unigram(vocabulary, 0, False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = Tokenizer(inner, max_length=20, pad_token_id=0)
    for text, words in (("York the York", [0, 0, 1, 2, 2]), ("the York", [0, 1, 1])):
        (encoding,) = tokenizer.encode([text])
        assert split_words(encoding, [text]) == words


def test_words_of_a_tokenizer_that_splits_are_as_they_were(tokenizer: Tokenizer) -> None:
    (encoding,) = tokenizer.encode(["the cats sat , on a mat ."])
    assert split_words(encoding, ["the cats sat , on a mat ."]) == encoding.words
