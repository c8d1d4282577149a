"""Answers to questions, as spans of a context (task question-answering)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxpress.errors import InputError
from onnxpress.manifest import Json
from onnxpress.runtime.text_runner import Answer, TextRunner, check_count, softmax
from onnxpress.runtime.tokenization import Encoding, Sample

_LONGEST_ANSWER = 30  # tokens
_STRIDE = 128  # tokens that two windows of a long context share, at most half a window


class QuestionAnswerer(TextRunner):
    """Extracts answers. Contexts longer than the model takes are read in overlapping windows, so nothing is cut."""

    task = "question-answering"
    one_answer_a_token = True

    def answer(self, question: str, context: str) -> dict[str, Json]:
        """The best answer: answer, score, start, end (characters of the context). Raises InputError."""
        return self.predict([(question, context)])[0][0]

    def predict(self, pairs: Sequence[tuple[str, str]], *, top_k: int = 1) -> list[list[dict[str, Json]]]:
        """For each (question, context) up to top_k answers, best first. Raises InputError.

        A score is the product of the probabilities of start and end, over the tokens of the window.
        """
        check_count(top_k)
        for index, pair in enumerate(pairs):
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise InputError(f"Item {index} is not a pair (question, context).")
        stride = min(_STRIDE, self.tokenizer.max_length // 4)
        windows = [self.tokenizer.windows(pair, stride=stride) for pair in pairs]
        answers = iter(self.run_encodings([window for several in windows for window in several]))
        found = []
        for (_, context), several in zip(pairs, windows, strict=True):
            spans: dict[tuple[int, int], float] = {}
            for window in several:
                for start, end, score in _best_spans(window, next(answers), top_k):
                    spans[start, end] = max(score, spans.get((start, end), 0.0))
            ranked = sorted(spans.items(), key=lambda item: -item[1])[:top_k]
            found.append(
                [
                    {"answer": context[start:end], "score": score, "start": start, "end": end}
                    for (start, end), score in ranked
                ]
            )
        return found

    def answer_texts(self, samples: Sequence[Sample], *, top_k: int | None = None) -> list[Json]:
        """The answers for each (question, context)."""
        if any(isinstance(sample, str) for sample in samples):
            raise InputError("A question needs a context: give each --text, the question, a --pair, the context.")
        return list(self.predict(list(samples), top_k=top_k or 1))  # type: ignore[arg-type]


def _best_spans(window: Encoding, answer: Answer, count: int) -> list[tuple[int, int, float]]:
    """(start, end, score) in characters of the context; only tokens of the context can answer."""
    inside = np.array([sequence == 1 for sequence in window.sequences])
    if not inside.any():
        return []
    masked = {
        name: np.where(inside, answer[name].astype(np.float64), -np.inf) for name in ("start_logits", "end_logits")
    }
    # As the field does: the probabilities are over all tokens that may answer.
    starts, ends = softmax(masked["start_logits"]), softmax(masked["end_logits"])
    scores = np.triu(np.outer(starts, ends))
    scores -= np.triu(scores, k=_LONGEST_ANSWER)
    best = np.argsort(scores, axis=None)[::-1][:count]
    spans = []
    for flat in best:
        first, last = divmod(int(flat), len(ends))
        if scores[first, last] > 0:
            spans.append((window.offsets[first][0], window.offsets[last][1], float(scores[first, last])))
    return spans
