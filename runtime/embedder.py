"""Embeddings of texts (task feature-extraction)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxpress.errors import InputError
from onnxpress.manifest import Json, Runnable
from onnxpress.runtime.text_runner import TextRunner
from onnxpress.runtime.tokenization import Encoding, Sample, Tokenizer, check_samples


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

    def encode(self, samples: Sequence[Sample], *, prompt: str | None = None) -> list[Encoding]:
        """Tokenize as TextRunner.encode does, with a prompt of the model (see embed) before each text, or the first of two."""
        before = self._prompt(prompt)
        if before and not isinstance(samples, str):
            check_samples(samples)
            samples = [before + item if isinstance(item, str) else (before + item[0], item[1]) for item in samples]
        return super().encode(samples)

    def embed(self, texts: Sequence[Sample], *, prompt: str | None = None) -> npt.NDArray[np.float32]:
        """Embeddings, float32 (texts, dim). Raises InputError for what is no text, or empty.

        prompt: the name of one of the model's prompts ("query", "document"), which is put before each text; "" is none, None the one that
        the model declares for texts of which nothing is said, if any.
        """
        answers = self.run_encodings(self.encode(texts, prompt=prompt))
        if not answers:
            return np.zeros((0, self.dim), np.float32)
        return np.stack([self._vector(answer) for answer in answers])

    def answer_texts(
        self, samples: Sequence[Sample], *, top_k: int | None = None, prompt: str | None = None
    ) -> list[Json]:
        """A list of numbers a text. prompt: as of embed."""
        if top_k is not None:
            raise InputError("An embedding model has one answer a text; leave top_k out.")
        return [[float(number) for number in vector] for vector in self.embed(samples, prompt=prompt)]

    def _prompt(self, name: str | None) -> str:
        name = self.options.get("default_prompt", "") if name is None else name
        if not isinstance(name, str):
            raise InputError(f"prompt is {name!r}; it takes the name of one of the model's prompts.")
        prompts: Mapping[str, str] = self.options.get("prompts", {})
        if name and name not in prompts:
            known = f"they are: {', '.join(prompts)}" if prompts else "it has none"
            raise InputError(f"The model has no prompt {name!r}; {known}.")
        return prompts[name] if name else ""

    def _vector(self, answer: dict[str, np.ndarray[Any, Any]]) -> npt.NDArray[np.float32]:
        if self.options["pooled"]:
            return answer["embeddings"]
        mean: npt.NDArray[np.float32] = answer["last_hidden_state"].mean(axis=0)
        return mean
