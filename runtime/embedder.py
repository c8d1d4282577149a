"""Embeddings of texts (task feature-extraction)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.errors import InputError
from onnxpress.manifest import Json, Runnable
from onnxpress.runtime.text_runner import TextRunner
from onnxpress.runtime.tokenization import Sample, Tokenizer


class Embedder(TextRunner):
    """One vector a text, pooled and normalized as the model declares; without a pooling, the mean over its tokens."""

    task = "feature-extraction"

    def __init__(
        self,
        session: Runnable,
        tokenizer: Tokenizer,
        options: Mapping[str, Json],
        *,
        tokens_per_chunk: int | None = None,
    ) -> None:
        super().__init__(session, tokenizer, options, tokens_per_chunk=tokens_per_chunk)
        self.one_answer_a_token = not options["pooled"]

    @property
    def dim(self) -> int:
        """Width of a vector."""
        return int(self.options["dim"])

    def embed(self, texts: Sequence[Sample]) -> npt.NDArray[np.float32]:
        """Embeddings, float32 (texts, dim). Raises InputError for what is no text, or empty."""
        answers = self.outputs(texts)
        if not answers:
            return np.zeros((0, self.dim), np.float32)
        return np.stack([self._vector(answer) for answer in answers])

    def answer_texts(self, samples: Sequence[Sample], *, top_k: int | None = None) -> list[Json]:
        """A list of numbers a text."""
        if top_k is not None:
            raise InputError("An embedding model has one answer a text; leave top_k out.")
        return [[float(number) for number in vector] for vector in self.embed(samples)]

    def _vector(self, answer: dict[str, np.ndarray[Any, Any]]) -> npt.NDArray[np.float32]:
        if self.options["pooled"]:
            return answer["embeddings"]
        mean: npt.NDArray[np.float32] = answer["last_hidden_state"].mean(axis=0)
        return mean
