"""Tokenization: counts what it cuts, refuses what is no text, windows that cover everything."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny_graphs import make_tokenizer

from onnxpress.errors import ArtifactError, InputError
from onnxpress.runtime.tokenization import Tokenizer

LONG = "cat " * 40


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer(), max_length=12, pad_token_id=0)


def test_padding_is_on_the_right(tokenizer: Tokenizer) -> None:
    arrays = tokenizer.batch(tokenizer.encode(["the cat", "the cat sat on a mat"]))
    assert arrays["input_ids"].shape == (2, 8)
    np.testing.assert_array_equal(arrays["attention_mask"][0], [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(arrays["input_ids"][0, 4:], 0)
    assert all(array.dtype == np.int64 for array in arrays.values())


def test_what_is_cut_is_counted(tokenizer: Tokenizer) -> None:
    short, long = tokenizer.encode(["the cat", LONG])
    assert (short.truncated, len(short)) == (0, 4)
    assert (long.truncated, len(long)) == (30, 12)
    assert long.ids[0] == 2  # [CLS] and [SEP] stay
    assert long.ids[-1] == 3


def test_pairs(tokenizer: Tokenizer) -> None:
    (pair,) = tokenizer.encode([("the cat", "sat")])
    assert pair.type_ids == [0, 0, 0, 0, 1, 1]
    assert pair.sequences == [None, 0, 0, None, 1, None]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([""], "Text 0 is empty"),
        (["cat", "  \n"], "Text 1 is empty"),
        ([("cat", "")], "Text 0 is empty"),
        (["cat", 3], "Item 1 is a int"),
        ([None], "Item 0 is a NoneType"),
        ("cat", "put it in brackets"),
        (["cat \ud800"], "half a character"),
    ],
)
def test_what_is_no_text_is_refused(tokenizer: Tokenizer, samples: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        tokenizer.encode(samples)


def test_windows_cover_the_whole_context(tokenizer: Tokenizer) -> None:
    context = " ".join(["the", "cat", "sat", "on", "a", "mat", "dog", "ran"] * 5)
    windows = tokenizer.windows(("who sat", context), stride=2)
    assert all(len(window) <= 12 for window in windows)
    seen = {
        offset
        for window in windows
        for offset, sequence in zip(window.offsets, window.sequences, strict=True)
        if sequence == 1
    }
    assert len(seen) == 40
    assert max(end for _, end in seen) == len(context)


def test_a_question_that_fills_the_model_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="10 tokens, which leaves too little"):
        tokenizer.windows(("who " * 10, "the cat"), stride=2)


def test_threads_do_not_disturb_each_other(tokenizer: Tokenizer) -> None:
    def work(index: int) -> tuple[int, int]:
        windows = tokenizer.windows(("who", LONG), stride=index % 3 + 1)
        return len(windows), len(tokenizer.encode([LONG])[0])

    expected = [work(index) for index in range(24)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(24))) == expected


def test_a_very_long_text(tokenizer: Tokenizer) -> None:
    started = time.perf_counter()
    (encoding,) = tokenizer.encode(["cat " * 25_000])
    assert encoding.truncated == 25_002 - 12
    assert time.perf_counter() - started < 5


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path, max_length=8)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="not a tokenizer"):
        Tokenizer.from_folder(tmp_path, max_length=8)
