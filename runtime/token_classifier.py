"""Entities in texts (task token-classification): words, their labels, and spans of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from onnxpress.errors import InputError
from onnxpress.manifest import Json
from onnxpress.runtime.text_runner import Answer, TextRunner, softmax
from onnxpress.runtime.tokenization import Encoding, Sample, split_words, trimmed

Aggregation = Literal["first", "average", "max"]


@dataclass(frozen=True, kw_only=True)
class _Word:
    """Characters start … end, the label of the word and its probability."""

    start: int
    end: int
    label: str
    score: float


class TokenClassifier(TextRunner):
    """Spans with a type. Labels are in BIO form ("B-PER", "I-PER", "O"), or plain types."""

    task = "token-classification"
    one_answer_a_token = True

    def predict(self, texts: Sequence[str], *, aggregation: Aggregation = "first") -> list[list[dict[str, Json]]]:
        """For each text its entities: entity, score, start, end (characters), text.

        A word of several tokens takes the label of its first token, of its tokens' average, or of the most certain
        one. Raises InputError.
        """
        if aggregation not in get_args(Aggregation):
            raise InputError(f"aggregation={aggregation!r}; it can be {', '.join(get_args(Aggregation))}.")
        encodings = self.encode(texts)
        if any(isinstance(text, tuple | list) for text in texts):
            raise InputError("Entities are found in single texts; pairs were given.")
        answers = self.run_encodings(encodings)
        return [
            _spans(self._words(encoding, text, answer, aggregation), text)
            for text, encoding, answer in zip(texts, encodings, answers, strict=True)
        ]

    def answer_texts(self, samples: Sequence[Sample], *, top_k: int | None = None) -> list[Json]:
        """A list of entities a text."""
        if top_k is not None:
            raise InputError("Entities are all those found; leave top_k out.")
        return list(self.predict(samples))  # type: ignore[arg-type]

    def _words(self, encoding: Encoding, text: str, answer: Answer, aggregation: Aggregation) -> list[_Word]:
        probabilities = softmax(answer["logits"].astype(np.float64))  # (tokens, labels)
        groups: dict[int, list[int]] = {}
        for token, word in enumerate(split_words(encoding, (text,))):
            if word is not None:
                groups.setdefault(word, []).append(token)
        words = []
        for tokens in groups.values():
            row = _combined(probabilities[tokens], aggregation)
            label = int(row.argmax())
            words.append(
                _Word(
                    start=encoding.offsets[tokens[0]][0],
                    end=encoding.offsets[tokens[-1]][1],
                    label=self.options["labels"][label],
                    score=float(row[label]),
                )
            )
        return words


def _combined(probabilities: np.ndarray[Any, Any], aggregation: Aggregation) -> np.ndarray[Any, Any]:
    """(tokens, labels) → (labels,)."""
    row: np.ndarray[Any, Any]
    if aggregation == "first":
        row = probabilities[0]
    elif aggregation == "average":
        row = probabilities.mean(axis=0)
    else:
        row = probabilities[probabilities.max(axis=1).argmax()]
    return row


def _spans(words: Sequence[_Word], text: str) -> list[dict[str, Json]]:
    """Neighbouring words of one type are one span, unless a word begins a new one ("B-")."""
    spans: list[list[_Word]] = []
    types: list[str] = []
    before = ""
    for word in words:
        prefix, kind = split_tag(word.label)
        if kind and kind == before and prefix != "B":
            spans[-1].append(word)
        elif kind:
            spans.append([word])
            types.append(kind)
        before = kind
    entities = []
    for span, kind in zip(spans, types, strict=True):
        start, end = trimmed(text, span[0].start, span[-1].end)
        if start < end:
            score = float(np.mean([word.score for word in span]))
            entities.append({"entity": kind, "score": score, "start": start, "end": end, "text": text[start:end]})
    return entities


def split_tag(label: str) -> tuple[str, str]:
    """("B", "PER") of "B-PER"; an empty type for "O"."""
    if label == "O":
        return "", ""
    prefix, separator, kind = label.partition("-")
    return (prefix, kind) if separator and prefix in ("B", "I") else ("I", label)
