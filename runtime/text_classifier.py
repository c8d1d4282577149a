"""Labels for texts or pairs of texts (task text-classification)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxpress.errors import InputError
from onnxpress.manifest import Json
from onnxpress.runtime.text_runner import Answer, TextRunner, softmax
from onnxpress.runtime.tokenization import Sample


class TextClassifier(TextRunner):
    """Probabilities of labels: softmax for one label a text, a sigmoid each for several, the number for regression.

    The one number of a reranker goes through a sigmoid where transformers and sentence-transformers put it through one.
    """

    task = "text-classification"

    def predict(self, samples: Sequence[Sample]) -> list[dict[str, Json]]:
        """For each text or pair: label and score of the best, scores of all, and whether the text was truncated.

        For regression, label is the output's name and score its value. Raises InputError.
        """
        encodings = self.encode(samples)
        answers = self.run_encodings(encodings)
        return [
            {**self._judged(answer), "truncated": encoding.truncated > 0}
            for answer, encoding in zip(answers, encodings, strict=True)
        ]

    def answer_texts(self, samples: Sequence[Sample], *, top_k: int | None = None) -> list[Json]:
        """One prediction a text."""
        if top_k is not None:
            raise InputError("A classifier gives the scores of all labels; leave top_k out.")
        return list(self.predict(samples))

    def _judged(self, answer: Answer) -> dict[str, Json]:
        logits = answer["logits"].astype(np.float64)  # (labels,)
        kind = self.options["problem_type"]
        if kind == "regression" and self.options.get("activation") is None:
            scores = logits
        elif kind in ("regression", "multi_label_classification"):
            scores = np.exp(-np.logaddexp(0, -logits))  # the sigmoid, which does not overflow this way
        else:
            scores = softmax(logits)
        labels = self.options["labels"]
        best = int(scores.argmax())
        return {
            "label": labels[best],
            "score": float(scores[best]),
            "scores": {label: float(score) for label, score in zip(labels, scores, strict=True)},
        }
