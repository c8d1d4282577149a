"""Turns texts into padded token arrays with the `tokenizers` library. Truncation is counted, never silent."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnxpress.errors import ArtifactError, InputError

TOKENIZER = "tokenizer.json"

Sample = str | tuple[str, str]


class TruncationWarning(UserWarning):
    """Texts were longer than the model takes, and were cut."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """One text or pair as tokens; all lists have one entry a token.

    offsets: (start, end) characters in the text that the token comes from. words: index of the word, None for special
    tokens. sequences: 0 and 1 for the first and second text, None for special tokens. truncated: tokens cut off.
    """

    ids: list[int]
    type_ids: list[int]
    offsets: list[tuple[int, int]]
    words: list[int | None]
    sequences: list[int | None]
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class Tokenizer:
    """A tokenizer.json with our own padding, on the right to the longest of a batch, and truncation, on the side that the file says.

    side: where texts that are too long are cut, other than the file says.
    """

    def __init__(self, inner: Any, *, max_length: int, pad_token_id: int, side: str | None = None) -> None:
        self.inner = inner
        self.side = side or (inner.truncation or {}).get("direction", "right")
        self.max_length = max_length
        self.pad_token_id = pad_token_id
        inner.no_truncation()
        inner.no_padding()
        self._lock = threading.Lock()
        self._cutters: dict[int | None, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled for another process, without the lock."""
        again = partial(Tokenizer, max_length=self.max_length, pad_token_id=self.pad_token_id, side=self.side)
        return again, (self.inner,)

    @classmethod
    def from_folder(cls, folder: Path, *, max_length: int, pad_token_id: int = 0) -> Tokenizer:
        """Read tokenizer.json. Raises ArtifactError."""
        path = folder / TOKENIZER
        if not path.is_file():
            raise ArtifactError(f"{folder} has no {TOKENIZER}, so it cannot take text.")
        return cls.from_content(path.read_bytes(), max_length=max_length, pad_token_id=pad_token_id, where=path)

    @classmethod
    def from_content(
        cls, content: bytes | bytearray, *, max_length: int, pad_token_id: int, where: object
    ) -> Tokenizer:
        """What a tokenizer.json holds; `where` names the file in errors. Raises ArtifactError."""
        import tokenizers

        try:
            inner = tokenizers.Tokenizer.from_buffer(bytes(content))
        except Exception as error:  # the library raises Exception itself
            raise ArtifactError(f"{where} is not a tokenizer that this version of tokenizers reads: {error}") from None
        return cls(inner, max_length=max_length, pad_token_id=pad_token_id)

    def encode(self, samples: Sequence[Sample]) -> list[Encoding]:
        """Encode texts or pairs, each cut to max_length tokens. Raises InputError for what is no text, or empty."""
        check_samples(samples)
        samples = list(samples)  # a table's column goes by names
        encodings = self._encode(samples)
        for index, encoding in enumerate(encodings):
            if not encoding.ids:  # a row of padding alone has no answer, or a made-up one
                raise InputError(f"Text {index} has no tokens: the model's vocabulary holds none of its characters.")
        return [self._shortened(encoding, sample) for encoding, sample in zip(encodings, samples, strict=True)]

    def windows(self, sample: tuple[str, str], *, stride: int) -> list[Encoding]:
        """A pair whose second text is too long, as windows that overlap by `stride` tokens. Raises InputError."""
        check_samples([sample])
        first = self.inner.encode(sample[0], add_special_tokens=False)
        allowed = self.max_length - self.inner.num_special_tokens_to_add(True) - stride - 1
        if len(first.ids) > allowed:
            raise InputError(
                f"The first text has {len(first.ids)} tokens, which leaves too little of the model's {self.max_length} for "
                f"the second; {max(allowed, 0)} tokens are allowed."
            )
        whole = self._cutter(stride).encode(*sample)
        return [_encoding(window) for window in (whole, *whole.overflowing)]

    def batch(
        self, encodings: Sequence[Encoding], *, multiple: int = 1, most: int | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """input_ids, attention_mask and token_type_ids, int64 (batch, longest), padded on the right.

        multiple: to pad to, as far as the texts' maximum allows, and `most`, if that is less.
        """
        longest = max(map(len, encodings))
        padded = min(-(-longest // multiple) * multiple, self.max_length, most or self.max_length)
        shape = (len(encodings), max(longest, padded))
        ids = np.full(shape, self.pad_token_id, np.int64)
        mask = np.zeros(shape, np.int64)
        types = np.zeros(shape, np.int64)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding)] = encoding.ids
            mask[row, : len(encoding)] = 1
            types[row, : len(encoding)] = encoding.type_ids
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

    def _encode(self, samples: Sequence[Sample]) -> list[Any]:
        if len(samples) == 1:  # spares a short-lived process the library's thread pool
            return [_encode_one(self.inner, samples[0])]
        return list(self.inner.encode_batch(list(samples)))

    def _shortened(self, encoding: Any, sample: Sample) -> Encoding:
        excess = len(encoding.ids) - self.max_length
        if excess <= 0:
            return _encoding(encoding)
        return _encoding(_encode_one(self._cutter(None), sample), truncated=excess)

    def _cutter(self, stride: int | None) -> Any:
        """A copy of the tokenizer that truncates; settings of a shared one would reach other threads."""
        import tokenizers

        with self._lock:
            if stride not in self._cutters:
                copy = tokenizers.Tokenizer.from_str(self.inner.to_str())
                if stride is None:
                    copy.enable_truncation(self.max_length, direction=self.side)
                else:
                    copy.enable_truncation(self.max_length, stride=stride, strategy="only_second")
                self._cutters[stride] = copy
            return self._cutters[stride]


ONE_COLUMN = "give one column of a table, or a list (pairs as tuples)"


def check_samples(samples: Sequence[Any]) -> None:
    """Raise InputError for what is neither a text nor a pair of texts, or empty."""
    if isinstance(samples, str):
        raise InputError("One text was given where a list of texts is expected: put it in brackets, [text].")
    if isinstance(samples, Mapping | AbstractSet) or not hasattr(samples, "__len__"):  # neither has an order of items
        raise InputError(f"A {type(samples).__name__} was given where a list of texts is expected.")
    if (axes := getattr(samples, "ndim", 1)) != 1:  # a table's items are the names of its columns
        raise InputError(
            f"A {type(samples).__name__} of {axes} axes was given where a list of texts is expected: {ONE_COLUMN}."
        )
    for index, sample in enumerate(samples):
        for text in sample if isinstance(sample, tuple | list) and len(sample) == 2 else (sample,):
            if not isinstance(text, str):
                raise InputError(f"Item {index} is a {type(text).__name__}; a text or a pair of texts is expected.")
            if not text.strip():
                raise InputError(f"Text {index} is empty; there is nothing to answer.")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise InputError(f"Text {index} holds half a character (a lone surrogate); decode it again.") from None


def split_words(encoding: Encoding, texts: Sequence[str]) -> list[int | None]:
    """As `words`, but that white space ends a word: tokenizers of SentencePiece's kind may take a whole text for one.

    texts: the text, or both of a pair.
    """
    found: list[int | None] = []
    number = -1
    before: tuple[int, int] | None = None  # the text and the word of the token before
    # A lone sign for a space begins the word behind it; it is at the space, or at the first letter of a text.
    is_sign, first = False, -1
    for word, sequence, (start, end) in zip(encoding.words, encoding.sequences, encoding.offsets, strict=True):
        if word is None or sequence is None:
            found.append(None)
            continue
        text = texts[sequence]
        blank = text[start:end].isspace()
        after_space = text[start : start + 1].isspace() or text[max(0, start - 1) : start].isspace()
        begins = (sequence, word) != before or (after_space and not blank and not is_sign and start != first)
        number += begins
        before, first, is_sign = (sequence, word), start, begins and blank
        found.append(number)
    return found


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The characters without white space at their ends, which many tokenizers take to be part of a word."""
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    return start, start + len(part.strip())


def _encoding(encoding: Any, truncated: int = 0) -> Encoding:
    return Encoding(
        ids=encoding.ids,
        type_ids=encoding.type_ids,
        offsets=encoding.offsets,
        words=encoding.word_ids,
        sequences=encoding.sequence_ids,
        truncated=truncated,
    )


def _encode_one(inner: Any, sample: Sample) -> Any:
    return inner.encode(sample) if isinstance(sample, str) else inner.encode(*sample)
