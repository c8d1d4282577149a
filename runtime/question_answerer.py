"""Answers to questions, as spans of a context (task question-answering)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxpress.errors import InputError
from onnxpress.manifest import Json
from onnxpress.runtime.text_runner import Answer, TextRunner, check_count, softmax
from onnxpress.runtime.tokenization import Encoding, Sample, check_samples, split_words, trimmed

_STRIDE = 128  # tokens that two windows of a long context share, at most half a window


class QuestionAnswerer(TextRunner):
    """Extracts answers. Contexts longer than the model takes are read in overlapping windows, so nothing is cut."""

    task = "question-answering"
    one_answer_a_token = True

    def answer(self, question: str, context: str) -> dict[str, Json]:
        """The best answer: answer, score, start, end (characters of the context). Raises InputError."""
        found = self.predict([(question, context)])[0]
        if not found:
            raise InputError(
                "There is no answer to find: the context has no words, or the model answers numbers that are none."
            )
        return found[0]

    def predict(
        self, pairs: Sequence[tuple[str, str]], *, top_k: int = 1, max_answer_tokens: int = 15
    ) -> list[list[dict[str, Json]]]:
        """For each (question, context) up to top_k answers of whole words, best first. Raises InputError.

        A score is the product of the probabilities of start and end, over the context's tokens in the window and its
        first special token, by which models say that there is no answer. Spans of tokens that lie in the same words are
        one answer and their scores add up; of the windows that find an answer the surest counts.
        """
        check_count(top_k)
        check_samples(pairs)
        for index, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list):
                raise InputError(f"Item {index} is not a pair (question, context).")
        stride = min(_STRIDE, self.tokenizer.max_length // 4)
        windows = [self.tokenizer.windows(pair, stride=stride) for pair in pairs]
        answers = iter(self.run_encodings([window for several in windows for window in several]))
        found = []
        for pair, several in zip(pairs, windows, strict=True):
            context = pair[1]
            spans: dict[tuple[int, int], float] = {}
            for window in several:
                for span, score in _best_spans(window, pair, next(answers), 2 * top_k + 10, max_answer_tokens).items():
                    spans[span] = max(score, spans.get(span, 0.0))
            ranked = [
                {"answer": context[start:end], "score": score, "start": start, "end": end}
                for (first, last), score in sorted(spans.items(), key=lambda item: -item[1])
                for start, end in [trimmed(context, first, last)]
                if start < end
            ]
            found.append(ranked[:top_k])
        return found

    def answer_texts(self, samples: Sequence[Sample], *, top_k: int | None = None) -> list[Json]:
        """The answers for each (question, context)."""
        if any(isinstance(sample, str) for sample in samples):
            raise InputError("A question needs a context: give each question one with --pair.")
        return list(self.predict(list(samples), top_k=1 if top_k is None else top_k))  # type: ignore[arg-type]


def _best_spans(
    window: Encoding, sample: tuple[str, str], answer: Answer, count: int, longest: int
) -> dict[tuple[int, int], float]:
    """{(start, end): score} in characters of the context, from the `count` best spans of tokens."""
    inside = np.array([sequence == 1 for sequence in window.sequences])
    if not inside.any():
        return {}
    judged = inside.copy()
    if window.sequences[0] is None:
        judged[0] = True
    starts, ends = (
        np.where(inside, softmax(np.where(judged, answer[name].astype(np.float64), -np.inf)), 0.0)
        for name in ("start_logits", "end_logits")
    )
    scores = np.tril(np.triu(np.outer(starts, ends)), longest - 1)  # (first token, last token)
    words = _word_bounds(window, sample)
    spans: dict[tuple[int, int], float] = {}
    for flat in np.argsort(scores, axis=None)[::-1][:count]:
        first, last = divmod(int(flat), len(ends))
        if scores[first, last] > 0:
            span = words[first][0], words[last][1]
            spans[span] = spans.get(span, 0.0) + float(scores[first, last])
    return spans


def _word_bounds(window: Encoding, sample: tuple[str, str]) -> list[tuple[int, int]]:
    """For each token the characters (start, end) of its word, as far as the window has it."""
    bounds: dict[int, tuple[int, int]] = {}
    numbers = split_words(window, sample)
    for word, sequence, (start, end) in zip(numbers, window.sequences, window.offsets, strict=True):
        if sequence == 1 and word is not None:
            bounds[word] = (bounds.get(word, (start, end))[0], end)
    return [
        bounds[word] if sequence == 1 and word is not None else offset
        for word, sequence, offset in zip(numbers, window.sequences, window.offsets, strict=True)
    ]
